"""`pqcache calibrate`: a codebook for one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output


@click.command()
@_options.calibrate_options
@click.option("-m", "--merge", is_flag=True, help="One codebook for all layers and heads; less accurate.")
@click.option("-o", "--output", type=_options.NEW_FOLDER, default=Path("codebook"), show_default=True, help="Its folder.")
def command(merge: bool, output: Path, json_file: Path | None, **options: Any) -> None:
    """Learn a codebook from text and write it to a folder.

    \b
    Example:  pqcache calibrate --model tiny -o codebook --results rows.jsonl
    """
    was_there = (output / "codebook.json").exists()
    from hf_pqcache.eval.session.given import RECOMMENDED

    setup = _options.setup_of(options, ["pq"], [output, json_file], merge=merge, learns=True)
    shape = setup.config.pq_config
    book = setup.learning.codebook(setup.open(), shape)
    book = replace(book, settings={name: getattr(shape, name) for name in RECOMMENDED})
    book.save_pretrained(output)
    size = _output.bytes_text(book.nbytes)
    _output.say(f"{size}, {len(book.layers)} layers, fingerprint {book.fingerprint[:16]}, {_output.written(output, was_there)}")
    facts = {"folder": str(output), "fingerprint": book.fingerprint, "bytes": book.nbytes, **book.metadata}
    _output.write_json(json_file, facts)
