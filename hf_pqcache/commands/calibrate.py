"""`pqcache calibrate`: a codebook for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.commands import _options


@click.command(context_settings=_options.CONTEXT)
@_options.model_options
@click.option("-m", "--merge", is_flag=True, help="One codebook for all layers and heads; less accurate.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("codebook"), show_default=True)
def command(merge: bool, output: Path, json_file: Path | None, **options: Any) -> None:
    """Learn a codebook from text and write it to a folder.

    Example:  pqcache calibrate --model tiny -o codebook
    """
    with _options.friendly_errors():
        session, config, learning = _options.session_of(options, merge=merge)
        model, tokenizer = session.model, session.tokenizer
        book = learning.codebook(model, tokenizer, session.model_name, config.pq_config, session.progress)
        book.save_pretrained(output)
    facts = {"folder": str(output), "fingerprint": book.fingerprint, "bytes": book.nbytes, **book.metadata}
    click.echo(f"{output}: {book.nbytes:,} bytes, {len(book.layers)} layers, fingerprint {book.fingerprint[:16]}")
    if json_file is not None:
        _options.write_json(json_file, facts)
