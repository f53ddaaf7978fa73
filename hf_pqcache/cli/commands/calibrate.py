"""`pqcache calibrate`: a codebook for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output


@click.command()
@_options.calibrate_options
@click.option("--text", help="Held-out text to compare on: a file, demo, or task/split; by --calibration if absent.")
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Perplexity windows of it.")
@click.option("-o", "--output", type=_options.NEW_FOLDER, default=Path("codebook"), show_default=True, help="Its folder.")
def command(text: str | None, limit: int, output: Path, json_file: Path | None, **options: Any) -> None:
    """Learn a codebook of a model's own from text, and measure whether it is of use.

    Caches need none: one comes with the package and suits every model. What both lose on held-out text is told; use and
    publish the model's own only where it loses less.

    \b
    Example:  pqcache calibrate --model tiny -o codebook --results rows.jsonl
    """
    was_there = (output / "codebook.json").exists()
    from hf_pqcache.eval.calibrate import own_codebook
    from hf_pqcache.eval.session.texts import held_out_text, text_of

    data_dir = options["data_dir"]
    setup = _options.setup_of(options, ["pq"], [output, json_file], learns=True)
    held_out, name = text_of(text, data_dir) if text is not None else held_out_text(setup.learning.source, data_dir)
    book, found = own_codebook(setup, setup.open(), held_out, name, limit=limit)
    book.save_pretrained(output)
    size = _output.bytes_text(book.nbytes)
    _output.say(f"{size}, fingerprint {book.fingerprint[:16]}, {_output.written(output, was_there)}")
    for line in found.lines():
        _output.say(line)
    facts = {"folder": str(output), "fingerprint": book.fingerprint, "bytes": book.nbytes, **book.metadata, "wins": found.wins}
    _output.write_json(json_file, facts)
