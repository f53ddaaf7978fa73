"""`pqcache report`: result rows become PNG plots and one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from hf_pqcache.commands import _options


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("report"), show_default=True)
@click.option("--title", default="KV cache evaluation", show_default=True, help="Heading of the page.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also list the files here.")
def command(results: tuple[Path, ...], out: Path, title: str, json_file: Path | None) -> None:
    """Draw result files: perplexity against bits, time and memory against length, recall maps, one page with all.

    Example:  pqcache report results.jsonl -o report
    """
    try:
        from hf_pqcache.eval.report import write_report
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise click.ClickException(f"{error.name} is not installed; run: pip install 'hf-pqcache[plot]'") from error
    try:
        files = write_report(results, out, title)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{files[0]}, and {len(files) - 1} plots beside it")
    if json_file is not None:
        _options.save_json(json_file, {"page": str(files[0]), "plots": [str(file) for file in files[1:]]})
