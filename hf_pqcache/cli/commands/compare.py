"""`pqcache compare`: one model under every cache, one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _types, _unfinished


@click.command()
@_options.model_options
@click.option("--caches", type=_types.Words(), help="Comma-separated, e.g. dynamic,kivi:4,pq:3; the standard ones if absent.")
@_options.texts_option("To evaluate on")
@click.option("--measure", "measures", type=_types.Words(), help="Of perplexity, recall, memory, speed; all if absent.")
@click.option("--tokens", type=click.IntRange(min=64), help="Length of everything; 2048, or what the model holds, if absent.")
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Perplexity windows.")
@click.option("--chunk", type=click.IntRange(min=1), help="Tokens a step of the perplexity; 64, a page, if absent.")
@click.option("--recall-count", type=click.IntRange(min=0), default=20, show_default=True, help="Pass keys to ask for.")
@click.option("--filler", help="Text to hide pass keys in: a file, demo, noise, task/split; the first --text if absent.")
@click.option(
    "--press", "presses", type=_types.Words(), help="Also with pruned prompts, where a cache can: snapkv:0.5,knorm:0.5"
)
@click.option("--question-after", is_flag=True, help="Ask for pass keys in a turn of its own, unknown to what prunes the text.")
@click.option(
    "--outliers",
    type=click.FloatRange(min=0, min_open=True),
    help="Multiply two channels of the keys by this, and divide the queries': same model, keys like Qwen2.5's.",
)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True, help="Tokens to time.")
@click.option("--markdown", "markdown_file", type=_options.FILE, help="Also write the table here.")
@click.option("--plot", type=_options.FILE, help="Draw loss against true bits here (PNG; needs matplotlib).")
def command(
    caches: list[str] | None,
    texts: tuple[str, ...],
    measures: list[str] | None,
    tokens: int | None,
    limit: int,
    chunk: int | None,
    recall_count: int,
    filler: str | None,
    presses: list[str] | None,
    question_after: bool,
    outliers: float | None,
    new_tokens: int,
    markdown_file: Path | None,
    plot: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Perplexity, recall, bytes and speed of a model under every cache, side by side.

    True bits count codes and every scale and offset; "with window" adds the tokens that stay exact. "Smaller" is 16 over true
    bits, over the share of a prompt that is kept. All caches but those of transformers keep the same tokens exact; a name that
    ends in :own has the window of its authors. Under --press the first half of each window is a prompt, the rest is scored.

    \b
    Example:  pqcache compare --model tiny --caches dynamic,kivi:4,pq:4 \\
              --tokens 256 --limit 1 --measure perplexity --plot bits.png \\
              --results rows.jsonl
    """
    from hf_pqcache.eval.compare import DEFAULT_CACHES, MEASURES, check, compare, table
    from hf_pqcache.eval.session.outliers import plant_outliers
    from hf_pqcache.eval.session.texts import is_data_set, text_of

    measures, data_dir = measures or [*MEASURES], options["data_dir"]
    _check_measures(measures, MEASURES, plot)
    named = {name: text for text, name in (text_of(text, data_dir) for text in texts)}
    reads_data = any(is_data_set(source) for source in (*texts, *((filler,) if filler else ())))
    setup = _options.setup_of(
        options, _with_presses(caches or DEFAULT_CACHES, presses or []), [json_file, markdown_file, plot], reads_data=reads_data
    )
    count = recall_count if "recall" in measures else 0
    hidden_in = None if filler is None else text_of(filler, data_dir)[0]
    length = check(setup, named, tokens=tokens, recall_count=count, new_tokens=new_tokens, filler=hidden_in)
    session = setup.open()
    if outliers is not None:
        plant_outliers(session.model, outliers)
        session.loading["outliers"] = outliers  # a setting of every row
    lines, rows = compare(
        session,
        setup.specs,
        lambda spec: setup.ready(session, spec),
        named,
        measures=measures,
        tokens=length,
        windows=limit,
        chunk=chunk,
        recall_count=count,
        new_tokens=new_tokens,
        filler=hidden_in,
        question_after=question_after,
    )
    _output.show_table(
        f"{session.model_name}, {length} tokens, {session.device_name}, {session.model.dtype}, text {', '.join(named)}",
        table(lines),
        notes=[f"{line.cache}: {line.note}" for line in lines if line.note],
    )
    _unfinished.finished()
    _save(lines, rows, json_file, markdown_file, plot)


def _save(lines: list[Any], rows: list[Any], json_file: Path | None, markdown_file: Path | None, plot: Path | None) -> None:
    """Write what was asked for. Raises ClickException if a cache was not measured."""
    from hf_pqcache.eval.compare import markdown, picture

    if markdown_file is not None:
        _output.say(_output.written(markdown_file, _output.save_text(markdown_file, markdown(lines))))
    _output.write_json(json_file, {"table": [asdict(x) for x in lines], "rows": [row.to_dict() for row in rows]})
    if plot is not None:
        _output.say(_output.written(plot, _output.save_bytes(plot, picture(rows))))
    if failed := [line.cache for line in lines if line.note]:
        raise click.ClickException(f"{len(failed)} of {len(lines)} caches were not measured: {', '.join(failed)}")


def _with_presses(caches: Sequence[str], presses: Sequence[str]) -> list[str]:
    """The caches, and after each that can prune its prompts the same one with each press."""
    able = ("pq", "paged-kv")
    if presses and not any(cache.partition(":")[0] in able for cache in caches):
        raise click.UsageError(f"--press does nothing without one of {', '.join(able)} among --caches")
    able_caches = {cache for cache in caches if cache.partition(":")[0] in able}
    return [name for cache in caches for name in (cache, *(f"{cache}+{p}" for p in presses if cache in able_caches))]


def _check_measures(measures: Sequence[str], known: Sequence[str], plot: Path | None) -> None:
    if unknown := sorted({*measures} - {*known}):
        raise click.BadParameter(f"{', '.join(unknown)}: use some of {', '.join(known)}", param_hint="--measure")
    if plot is not None and "perplexity" not in measures:
        raise click.UsageError("--plot draws perplexities: leave it out, or add perplexity to --measure")
    unused = {
        "perplexity": {"limit": "--limit", "chunk": "--chunk"},
        "recall": {"recall_count": "--recall-count", "filler": "--filler", "question_after": "--question-after"},
        "speed": {"new_tokens": "--new-tokens"},
    }
    for measure in sorted({*unused} - {*measures}):
        _options.refuse_unused(f"without {measure} among what is measured", unused[measure])
