"""`pqcache calibrate`: a codebook for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.commands import _options, _output


@click.command()
@_options.model_options
@click.option("-m", "--merge", is_flag=True, help="One codebook for all layers and heads; less accurate.")
@click.option("-o", "--output", type=_options.NEW_FOLDER, default=Path("codebook"), show_default=True, help="Its folder.")
def command(merge: bool, output: Path, json_file: Path | None, **options: Any) -> None:
    """Learn a codebook from text and write it to a folder.

    \b
    Example:  pqcache calibrate --model tiny -o codebook
    """
    was_there = (output / "codebook.json").exists()
    session, config, learning = _options.session_of(options, merge=merge)
    model, tokenizer = session.model, session.tokenizer
    book = learning.codebook(model, tokenizer, session.model_name, config.pq_config, session.progress)
    book.save_pretrained(output)
    size = _output.bytes_text(book.nbytes)
    _output.say(f"{size}, {len(book.layers)} layers, fingerprint {book.fingerprint[:16]}, {_output.written(output, was_there)}")
    facts = {"folder": str(output), "fingerprint": book.fingerprint, "bytes": book.nbytes, **book.metadata}
    _output.write_json(json_file, facts)
