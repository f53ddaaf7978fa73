"""`pqcache demo`: an exact and a compressed cache side by side, on a small model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.commands import _options


def _print_demo(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    conditions = result["conditions"]
    table = Table(title=f"One sequence of {conditions['tokens']} tokens, {conditions['model'].rsplit('/', 1)[-1]}")
    for heading in ("cache", "perplexity", "change", "recall", "KV bytes", "of fp16", "codebooks"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in result["rows"]:
        table.add_row(
            row["cache"],
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_change']:+.2%}",
            f"{row['recall']:.0%}",
            f"{row['kv_bytes']:,}",
            f"{row['kv_ratio']:.0%}",
            f"{row['codebook_bytes']:,}",
        )
    console.print(table)
    console.print(f"…{result['prompt_end']}", style="dim", markup=False)
    for row in (result["rows"][0], result["rows"][1]):
        console.print(f"{row['cache']}: {row['continuation']}", markup=False)


@click.command()
@click.option("--model", type=str, default=None, help="Folder or Hub id of a causal LM; the embedded tiny one if absent.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Your own text, UTF-8.")
@click.option("--tokens", type=click.IntRange(min=256), default=1024, show_default=True, help="Length of a sequence.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the result here.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def command(model: str | None, text: Path | None, tokens: int, json_file: Path | None, quiet: bool) -> None:
    """Compare an exact and a compressed cache on a real small model, offline.

    Example:  pqcache demo --json demo.json
    """
    from hf_pqcache.eval import demo as runner

    options: dict[str, Any] = {"tokens": tokens, "progress": not quiet}
    if model is not None:
        options["model_path"] = model
    try:
        result = runner.run_demo(text=text.read_text() if text else None, **options)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    _print_demo(result)
    if json_file is not None:
        _options.write_json(json_file, result)
