"""`pqcache tune`: the best shape of a cache for a model, under a budget of bytes or of loss."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from hf_pqcache.commands import _options


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """ "32,64" as a list of ints."""
    try:
        return [int(part) for part in value.split(",")] if value else None
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: give numbers like 32,64") from error


def _print_search(search: Any, tokens: int, budget: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{budget}; bytes of {tokens} tokens; exact perplexity {search.exact:.4f}")
    for heading in ("", "M", "n", "page", "recent", "of fp16", "perplexity", "loss", ""):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for trial in search.trials:
        if trial.loss is None:
            continue
        config, is_best = trial.config, search.best is not None and trial.config == search.best.config
        table.add_row(
            "best" if is_best else "",
            *(str(x) for x in (config.num_subspaces, config.num_bits, config.page_size, config.extended_residual)),
            f"{trial.ratio:.1%}",
            f"{trial.perplexity:.4f}",
            f"{trial.loss:+.2%}",
            "Pareto" if trial.is_pareto else "",
            style="bold green" if is_best else None,
        )
    console = Console()
    console.print(table)
    notes: dict[str, int] = {}
    for trial in search.trials:
        notes[trial.note] = notes.get(trial.note, 0) + bool(trial.note)
    if told := ", ".join(f"{count} shapes: {note}" for note, count in notes.items() if note):
        console.print(f"not run: {told}", style="dim", markup=False)
    if search.best is not None and search.best.loss < 0:
        console.print("the best gains: this text hardly needs its distant tokens, a longer one would tell more", style="yellow")


@click.command(context_settings=_options.CONTEXT)
@_options.model_options
@click.option("--max-ratio", type=float, help="Most bytes, as a share of a half-precision cache: 0.28.")
@click.option("--max-loss", type=float, help="Largest relative rise of perplexity: 0.01 is 1 %.")
@click.option("--text", default="demo", show_default=True, help="To evaluate on: a file, demo, or task/split.")
@click.option("--tokens", type=click.IntRange(min=256), help="Length whose bytes count; the model's context if absent.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens of a perplexity window; the model config's if absent.")
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Perplexity windows.")
@click.option("--try-subspaces", callback=_numbers, help="Subspaces to try, e.g. 32,64.")
@click.option("--try-bits", callback=_numbers, default="8,6,4", show_default=True, help="Bits of a code to try.")
@click.option("--try-page-sizes", callback=_numbers, default="32,64,128", show_default=True, help="Page sizes to try.")
@click.option("--try-residuals", callback=_numbers, default="64,128,256", show_default=True, help="Recent windows to try.")
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

    Example:  pqcache tune -f tiny --max-loss 0.01 --results tune.jsonl -o best.yaml
    """
    from hf_pqcache.eval.setup import text_of
    from hf_pqcache.eval.tune import Budget, Grid, tune

    with _options.friendly_errors():
        budget = Budget(max_ratio, max_loss)
        evaluated, name = text_of(text, options["data_dir"])
        session, config, learning = _options.session_of(options)
        length = tokens or config.max_context_tokens or config.window_tokens

        def learn(shape: Any) -> Any:
            return learning.codebook(session.model, session.tokenizer, session.model_name, shape, session.progress)

        search = tune(
            session,
            learn,
            config.pq_config,
            evaluated,
            name,
            budget,
            Grid(try_subspaces, try_bits, try_page_sizes, try_residuals),
            tokens=length,
            window=window or config.window_tokens,
            limit=limit,
        )
    goal = f"least loss within {max_ratio:.1%} of the bytes" if max_ratio else f"fewest bytes within {max_loss:+.2%} of loss"
    _print_search(search, length, goal)
    if json_file is not None:
        _options.write_json(
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
    replace(config, **found, codebook=str(folder), codebook_revision=None).save(output, comment)
    click.echo(f"{output}, and its codebook in {folder}")
