"""`pqcache report`: result rows become PNG plots and one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from hf_pqcache.cli.commands import _options, _output


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=_options.NEW_FOLDER, default=Path("report"), show_default=True, help="Folder of the page.")
@click.option("--title", default="KV cache evaluation", show_default=True, help="Heading of the page.")
@_options.json_option("the list of files")
def command(results: tuple[Path, ...], out: Path, title: str, json_file: Path | None) -> None:
    """Draw result files: perplexity against bits, time and memory against length, recall maps, one page with all.

    \b
    Example:  pqcache report rows.jsonl -o report
    """
    try:
        from hf_pqcache.eval.report.html import PAGE, write_report
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise click.ClickException(f"{error.name} is not installed; run: pip install 'hf-pqcache[plot]'") from error
    was_there = (out / PAGE).exists()
    files = write_report(results, out, title)
    _output.say(f"{files[0]}, and {len(files) - 1} plots beside it" + (", over those that were there" if was_there else ""))
    if json_file is not None:
        _output.save_json(json_file, {"page": str(files[0]), "plots": [str(file) for file in files[1:]]})
