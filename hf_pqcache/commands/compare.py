"""`pqcache compare`: one model under every cache, one table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hf_pqcache.commands import _options


@click.command(context_settings=_options.CONTEXT)
@_options.model_options
@click.option("--caches", help="Comma-separated, e.g. dynamic,hqq:3,pq:3; the standard ten if absent.")
@click.option("--text", default="demo", show_default=True, help="To evaluate on: a file, demo, or task/split.")
@click.option("--tokens", type=click.IntRange(min=64), default=2048, show_default=True, help="Length of everything.")
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Perplexity windows.")
@click.option("--chunk", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens a step of the perplexity.")
@click.option("--recall-count", type=click.IntRange(min=0), default=20, show_default=True, help="Pass keys to ask for.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True, help="Tokens to time.")
@click.option("--markdown", "markdown_file", type=_options.FILE, help="Also write the table here.")
def command(
    caches: str | None,
    text: str,
    tokens: int,
    limit: int,
    chunk: int,
    recall_count: int,
    new_tokens: int,
    markdown_file: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Perplexity, recall, bytes and speed of a model under every cache, measured by the same code.

    Example:  pqcache compare --model tiny --caches dynamic,hqq:4,pq:4,pq:2 --tokens 1024
    """
    from rich.table import Table

    from hf_pqcache.eval.caches import CacheSpec, head_dim
    from hf_pqcache.eval.compare import COLUMNS, DEFAULT_CACHES, cells, compare, markdown
    from hf_pqcache.eval.setup import text_of

    with _options.friendly_errors():
        evaluated, name = text_of(text, options["data_dir"])
        session, config, learning = _options.session_of(options)
        names = caches.split(",") if caches else DEFAULT_CACHES
        specs = [CacheSpec.parse(x.strip(), head_dim(session.model), config.pq_config) for x in names]
        lines, rows = compare(
            session,
            specs,
            learning,
            evaluated,
            name,
            tokens=tokens,
            windows=limit,
            chunk=chunk,
            recall_count=recall_count,
            new_tokens=new_tokens,
        )
    console = _options.new_console()
    table = Table(title=f"{session.model_name}, {tokens} tokens, {session.device_name}, {session.model.dtype}, text {name}")
    has_notes = any(line.note for line in lines)
    for heading in ("cache", *COLUMNS, *([""] if has_notes else [])):
        table.add_column(
            heading, justify="left" if heading in ("cache", "") else "right", overflow="fold", no_wrap=heading == "cache"
        )
    for line in lines:
        table.add_row(line.cache, *cells(line), *([line.note] if has_notes else []))
    console.print(table)
    if markdown_file is not None:
        markdown_file.write_text(markdown(lines), encoding="utf-8")
        click.echo(f"written to {markdown_file}")
    if json_file is not None:
        _options.write_json(json_file, {"table": [asdict(x) for x in lines], "rows": [row.to_dict() for row in rows]})
