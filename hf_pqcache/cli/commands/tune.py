"""`pqcache tune`: the best shape of a cache for a model, under a budget of bytes or of loss."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _types, _unfinished


def _print_search(search: Any, tokens: int, budget: str) -> None:
    from hf_pqcache.eval.session.caches import codes_text

    trials = [trial for trial in search.trials if trial.loss is not None]
    is_best = [search.best is not None and trial.config == search.best.config for trial in trials]
    notes: dict[str, int] = {}
    for trial in search.trials:
        notes[trial.note] = notes.get(trial.note, 0) + bool(trial.note)
    told = [f"not run: {', '.join(f'{n} shapes: {note}' for note, n in notes.items() if note)}"] if any(notes) else []
    if search.best is not None and search.again is not None:
        loss, recall, exact = search.again
        keys = "" if recall is None else f", {recall:.0%} of the pass keys (exact {exact:.0%})"
        told.append(f"the best, measured anew on other text and keys by the running cache: {loss:+.2%}{keys}")
    _output.show_table(
        f"{budget}; bytes of {tokens} tokens; exact perplexity {search.exact:.4f}"
        + ("" if search.exact_recall is None else f", {search.exact_recall:.0%} of the pass keys"),
        {
            "": ["best" if best else "Pareto" if trial.is_pareto else "-" for trial, best in zip(trials, is_best, strict=True)],
            "codes": [codes_text(trial.config.to_dict()) for trial in trials],
            "page": [str(trial.config.page_size) for trial in trials],
            "recent": [str(trial.config.extended_residual) for trial in trials],
            "of fp16": [f"{trial.ratio:.1%}" for trial in trials],
            "perplexity": [f"{trial.perplexity:.4f}" for trial in trials],
            "loss": [f"{trial.loss:+.2%}" for trial in trials],
            "recall": ["" if trial.recall is None else f"{trial.recall:.0%}" for trial in trials],
        },
        styles=["bold green" if best else None for best in is_best],
        notes=told,
    )


@click.command()
@_options.tune_options
@click.option(
    "--max-ratio", type=click.FloatRange(min=0, min_open=True), help="Most bytes, as a share of a half-precision cache: 0.28."
)
@click.option(
    "--max-loss", type=click.FloatRange(min=0, min_open=True), help="Largest relative rise of perplexity: 0.01 is 1 %."
)
@click.option(
    "--max-recall-loss", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Pass keys that may be lost."
)
@click.option("--text", help="Long text to evaluate on: a file, demo, or task/split; the articles told twice if absent.")
@click.option("--tokens", type=click.IntRange(min=256), help="Length whose bytes count; the model's context if absent.")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    help="Tokens of a perplexity window and of a prompt; 4096, or what model and text hold, if absent.",
)
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Perplexity windows.")
@click.option("--recall-count", type=click.IntRange(min=0), default=4, show_default=True, help="Pass keys at each of 5 depths.")
@click.option("--try-subspaces", type=_types.Numbers(int, 8, 1024), help="Codes of a key, and of a value, to try, e.g. 32,64.")
@click.option(
    "--try-bits", type=_types.Numbers(int, 4, 8), help="Bits of one of them, e.g. 8,6. Without both: the operating points."
)
@click.option(
    "--try-page-sizes", type=_types.Numbers(int, 16, 512), default="32,64,128", show_default=True, help="Page sizes to try."
)
@click.option(
    "--try-residuals",
    type=_types.Numbers(int, 1, 1 << 20),
    default="64,128,256",
    show_default=True,
    help="Recent windows to try.",
)
@click.option("-o", "--output", type=_options.FILE, default=Path("best.yaml"), show_default=True, help="The best, as YAML.")
def command(
    max_ratio: float | None,
    max_loss: float | None,
    max_recall_loss: float,
    text: str | None,
    tokens: int | None,
    window: int | None,
    limit: int,
    recall_count: int,
    try_subspaces: list[int] | None,
    try_bits: list[int] | None,
    try_page_sizes: list[int],
    try_residuals: list[int],
    output: Path,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Search page size, recent window and codes of both sides under a budget; write the best as a model config.

    Shapes are measured by perplexity on a long text and by pass keys, the winner once more by the running cache.

    \b
    Example:  pqcache tune -f tiny --max-loss 0.05 --try-subspaces 32 \\
              --try-bits 8 --try-residuals 64 --window 768 --limit 1 \\
              --recall-count 1 -o best.yaml
    """
    from hf_pqcache.eval.measure.recall import ANSWER_TOKENS, check_recall
    from hf_pqcache.eval.search.trials import DEPTHS, Runner, window_of
    from hf_pqcache.eval.search.trials import material as cut
    from hf_pqcache.eval.search.tune import Budget, Grid, share_of_bytes, tune
    from hf_pqcache.eval.session.caches import CODES, CacheSpec, head_dim_of
    from hf_pqcache.eval.session.models import token_ids
    from hf_pqcache.eval.session.texts import is_data_set, text_of
    from hf_pqcache.models.positions import check_positions

    if not recall_count:
        _options.refuse_unused("where no pass key is asked for", {"max_recall_loss": "--max-recall-loss"})
    was_there = output.exists()
    budget = Budget(max_ratio, max_loss, max_recall_loss)
    evaluated, name = text_of(text or "demo", options["data_dir"])
    outputs = [output, output.with_suffix(".codebook"), json_file]
    setup = _options.setup_of(options, ["pq"], outputs, reads_data=is_data_set(text or "demo"))
    config, length = setup.config, tokens or setup.limit or setup.window
    check_positions(length, setup.limit, "a sequence whose bytes count", "--tokens")
    chosen = window or window_of(setup, evaluated, told_twice=text is None)
    check_positions(chosen, setup.limit, "a perplexity window", "--window")
    share_of_bytes(config.pq_config, setup.hf_config, length)  # if there is nothing to tune it says so
    grid = Grid(try_subspaces, try_bits, try_page_sizes, try_residuals)
    configs = grid.configs(config.pq_config, head_dim_of(setup.hf_config))
    for shape in configs:
        CacheSpec("pq", shape.to_dict()).check_room(chosen)
    material = cut(setup.tokenizer, evaluated, name, window=chosen, limit=limit, told_twice=text is None)
    prompt = chosen - ANSWER_TOKENS
    if recall_count:
        check_recall(setup.tokenizer, token_ids(setup.tokenizer, evaluated), [prompt], DEPTHS, setup.limit)
    session = setup.open()
    runner = Runner(
        session,
        lambda spec: setup.ready(session, spec),
        material,
        max(configs, key=lambda shape: shape.window_slots),
        window=chosen,
        recall_tokens=prompt,
        recall_count=recall_count,
    )
    if max_loss is not None and max_loss >= runner.reach:
        raise click.UsageError(
            f"--max-loss {max_loss} is more than forgetting every distant token costs on {material.name} ({runner.reach:.2%}): "
            "any cache would do; ask for less"
        )
    search = tune(runner, configs, setup.hf_config, budget, tokens=length, progress=session.progress)
    goal = f"least loss within {max_ratio:.1%} of the bytes" if max_ratio else f"fewest bytes within {max_loss:+.2%} of loss"
    _print_search(search, length, goal)
    _unfinished.finished()
    _output.write_json(
        json_file,
        {
            "exact_perplexity": search.exact,
            "exact_recall": search.exact_recall,
            "measured_anew": search.again,
            "best": None if search.best is None else asdict(search.best),
            "trials": [asdict(trial) for trial in search.trials],
        },
    )
    if search.best is None:
        raise click.ClickException(
            "no shape keeps to the budget and to the pass keys; allow more, or widen the search (--try-subspaces, ...)"
        )
    shape = search.best.config
    found = {key: getattr(shape, key) for key in ("bits", *CODES, "page_size", "extended_residual")}
    comment = (
        f"Found by pqcache tune: {goal}.\n"
        f"{search.best.loss:+.2%} perplexity on {material.name}, {search.best.ratio:.1%} of the bytes of {length} tokens."
    )
    told = _output.written(output, was_there)
    folder = output.with_suffix(".codebook")
    if search.codebook is not None:
        settings = {key: found[key] for key in ("page_size", "extended_residual")} | {"sink_tokens": shape.sink_tokens}
        replace(search.codebook, settings=settings).save_pretrained(folder)
        told += f", its codebook to {folder}"
    own = None if search.codebook is None else f"./{folder.name}"
    replace(config, **found, codebook=own, codebook_revision=None).save(output, comment)
    _output.say(told)
