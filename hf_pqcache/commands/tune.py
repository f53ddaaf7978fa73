"""`pqcache tune`: the best shape of a cache for a model, under a budget of bytes or of loss."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from hf_pqcache.commands import _options, _output, _unfinished


def _print_search(search: Any, tokens: int, budget: str) -> None:
    trials = [trial for trial in search.trials if trial.loss is not None]
    is_best = [search.best is not None and trial.config == search.best.config for trial in trials]
    notes: dict[str, int] = {}
    for trial in search.trials:
        notes[trial.note] = notes.get(trial.note, 0) + bool(trial.note)
    told = [f"not run: {', '.join(f'{n} shapes: {note}' for note, n in notes.items() if note)}"] if any(notes) else []
    if search.best is not None and search.best.loss < 0:
        told.append("the best gains: this text hardly needs its distant tokens, a longer one would tell more")
    _output.show_table(
        f"{budget}; bytes of {tokens} tokens; exact perplexity {search.exact:.4f}",
        {
            "": ["best" if best else "Pareto" if trial.is_pareto else "-" for trial, best in zip(trials, is_best, strict=True)],
            "M": [str(trial.config.num_subspaces) for trial in trials],
            "n": [str(trial.config.num_bits) for trial in trials],
            "page": [str(trial.config.page_size) for trial in trials],
            "recent": [str(trial.config.extended_residual) for trial in trials],
            "of fp16": [f"{trial.ratio:.1%}" for trial in trials],
            "perplexity": [f"{trial.perplexity:.4f}" for trial in trials],
            "loss": [f"{trial.loss:+.2%}" for trial in trials],
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
@_options.text_option("To evaluate on")
@click.option("--tokens", type=click.IntRange(min=256), help="Length whose bytes count; the model's context if absent.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens of a perplexity window; the model config's if absent.")
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Perplexity windows.")
@click.option("--try-subspaces", type=_options.Numbers(int, 8, 1024), help="Subspaces to try, e.g. 32,64.")
@click.option("--try-bits", type=_options.Numbers(int, 4, 8), default="8,6,4", show_default=True, help="Bits of a code to try.")
@click.option(
    "--try-page-sizes", type=_options.Numbers(int, 16, 512), default="32,64,128", show_default=True, help="Page sizes to try."
)
@click.option(
    "--try-residuals",
    type=_options.Numbers(int, 1, 1 << 20),
    default="64,128,256",
    show_default=True,
    help="Recent windows to try.",
)
@click.option("-o", "--output", type=_options.FILE, default=Path("best.yaml"), show_default=True, help="The best, as YAML.")
def command(
    max_ratio: float | None,
    max_loss: float | None,
    text: str,
    tokens: int | None,
    window: int | None,
    limit: int,
    try_subspaces: list[int] | None,
    try_bits: list[int],
    try_page_sizes: list[int],
    try_residuals: list[int],
    output: Path,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Search page size, recent window, subspaces and bits under a budget; write the best as a model config.

    \b
    Example:  pqcache tune -f tiny --max-loss 0.01 --results tune.jsonl -o best.yaml
    """
    from hf_pqcache.eval.setup import text_of
    from hf_pqcache.eval.tune import Budget, Grid, tune
    from hf_pqcache.positions import check_positions

    was_there = output.exists()
    budget = Budget(max_ratio, max_loss)
    evaluated, name = text_of(text, options["data_dir"])
    setup = _options.setup_of(options, ["pq"], [output, output.with_suffix(".codebook"), json_file], learns=True)
    config, length = setup.config, tokens or setup.limit or setup.window
    check_positions(length, setup.limit, "a sequence whose bytes count", "--tokens")
    check_positions(window or 0, setup.limit, "a perplexity window", "--window")
    session = setup.open()

    def learn(shape: Any) -> Any:
        return setup.learning.codebook(session, shape)

    search = tune(
        session,
        learn,
        config.pq_config,
        evaluated,
        name,
        budget,
        Grid(try_subspaces, try_bits, try_page_sizes, try_residuals),
        tokens=length,
        window=window or setup.window,
        limit=limit,
    )
    goal = f"least loss within {max_ratio:.1%} of the bytes" if max_ratio else f"fewest bytes within {max_loss:+.2%} of loss"
    _print_search(search, length, goal)
    _unfinished.finished()
    _output.write_json(
        json_file,
        {
            "exact_perplexity": search.exact,
            "best": None if search.best is None else asdict(search.best),
            "trials": [asdict(trial) for trial in search.trials],
        },
    )
    if search.best is None or search.codebook is None:
        raise click.ClickException("no shape keeps to the budget; allow more, or widen the search (--try-subspaces, ...)")
    shape = search.best.config
    found = {key: getattr(shape, key) for key in ("num_subspaces", "num_bits", "page_size", "extended_residual")}
    folder = output.with_suffix(".codebook")
    settings = {key: found[key] for key in ("page_size", "extended_residual")} | {"sink_tokens": shape.sink_tokens}
    replace(search.codebook, settings=settings).save_pretrained(folder)
    comment = (
        f"Found by pqcache tune: {goal}.\n"
        f"{search.best.loss:+.2%} perplexity on {name}, {search.best.ratio:.1%} of the bytes of {length} tokens."
    )
    replace(config, **found, codebook=f"./{folder.name}", codebook_revision=None).save(output, comment)
    _output.say(f"{_output.written(output, was_there)}, its codebook to {folder}")
