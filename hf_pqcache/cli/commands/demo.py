"""`pqcache demo`: an exact and a compressed cache side by side, on a small model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output


def _print_demo(result: dict[str, Any]) -> None:
    from hf_pqcache.eval.demo import COLUMNS

    conditions, rows = result["conditions"], result["rows"]
    _output.show_table(
        f"One sequence of {conditions['tokens']} tokens, {conditions['model'].rstrip('/').rsplit('/', 1)[-1]}",
        {heading: [tell(row) for row in rows] for heading, tell in COLUMNS.items()},
    )
    _output.say(f"…{result['prompt_end']}")
    for row in rows[:2]:
        _output.say(f"{row['cache']}: {row['continuation']}")


@click.command()
@click.option("--model", help="Folder, Hub id or model config of a causal LM; the embedded tiny one if absent.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Your own text, UTF-8.")
@click.option("--tokens", type=click.IntRange(min=256), help="Length of a sequence; 1024, or what the model holds, if absent.")
@click.option("--limit", type=click.IntRange(min=1), help="Perplexity windows; all of the text if absent.")
@click.option("--recall-count", type=click.IntRange(min=1), default=10, show_default=True, help="Pass keys to ask for.")
@click.option("--markdown", "markdown_file", type=_options.FILE, help="Also write the table here.")
@_options.json_option("the result")
@_options.quiet_option()
def command(
    model: str | None,
    text: Path | None,
    tokens: int | None,
    limit: int | None,
    recall_count: int,
    markdown_file: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Compare an exact and a compressed cache on a real small model, offline.

    \b
    Example:  pqcache demo --tokens 256 --limit 2 --recall-count 2 \\
              --json demo.json
    """
    from hf_pqcache.eval import demo as runner
    from hf_pqcache.eval.session.model_config import load_model_config
    from hf_pqcache.eval.session.texts import read_text

    for path in (markdown_file, json_file):
        _output.check_writable(path)
    options: dict[str, Any] = {"tokens": tokens, "limit": limit, "recall_count": recall_count, "progress": not quiet}
    if not quiet:
        options["note"] = _output.note
    if model is not None:
        options["model_path"] = load_model_config(model).source
    result = runner.run_demo(text=read_text(text) if text else None, **options)
    _print_demo(result)
    if markdown_file is not None:
        _output.say(_output.written(markdown_file, _output.save_text(markdown_file, runner.markdown(result))))
    _output.write_json(json_file, result)
