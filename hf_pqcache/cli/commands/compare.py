"""`pqcache compare`: one model under every cache, one table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _unfinished


@click.command()
@_options.model_options
@click.option("--caches", type=_options.Words(), help="Comma-separated, e.g. dynamic,hqq:3,pq:3; the standard ten if absent.")
@_options.text_option("To evaluate on")
@click.option("--tokens", type=click.IntRange(min=64), help="Length of everything; 2048, or what the model holds, if absent.")
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Perplexity windows.")
@click.option("--chunk", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens a step of the perplexity.")
@click.option("--recall-count", type=click.IntRange(min=0), default=20, show_default=True, help="Pass keys to ask for.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True, help="Tokens to time.")
@click.option("--markdown", "markdown_file", type=_options.FILE, help="Also write the table here.")
def command(
    caches: list[str] | None,
    text: str,
    tokens: int | None,
    limit: int,
    chunk: int,
    recall_count: int,
    new_tokens: int,
    markdown_file: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Perplexity, recall, bytes and speed of a model under every cache, side by side.

    \b
    Example:  pqcache compare --model tiny --caches dynamic,pq:4 --tokens 256 \\
              --limit 1 --recall-count 4 --results rows.jsonl
    """
    from hf_pqcache.eval.compare import DEFAULT_CACHES, check, compare, markdown, table
    from hf_pqcache.eval.session.texts import text_of

    evaluated, name = text_of(text, options["data_dir"])
    setup = _options.setup_of(options, caches or DEFAULT_CACHES, [json_file, markdown_file])
    length = check(setup, evaluated, tokens=tokens, recall_count=recall_count, new_tokens=new_tokens)
    session = setup.open()
    lines, rows = compare(
        session,
        setup.specs,
        lambda spec: setup.ready(session, spec),
        evaluated,
        name,
        tokens=length,
        windows=limit,
        chunk=chunk,
        recall_count=recall_count,
        new_tokens=new_tokens,
    )
    failed = [line for line in lines if line.note]
    _output.show_table(
        f"{session.model_name}, {length} tokens, {session.device_name}, {session.model.dtype}, text {name}",
        table(lines),
        notes=[f"{line.cache}: {line.note}" for line in failed],
    )
    _unfinished.finished()
    if markdown_file is not None:
        _output.say(_output.written(markdown_file, _output.save_text(markdown_file, markdown(lines))))
    _output.write_json(json_file, {"table": [asdict(x) for x in lines], "rows": [row.to_dict() for row in rows]})
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(lines)} caches were not measured: {', '.join(x.cache for x in failed)}"
        )
