"""`pqcache doctor`: what works on this machine, and the line that mends what does not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hf_pqcache.commands import _options

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]--[/]", "fail": "[red]FAIL[/]"}


@click.command()
@click.option("--no-kernels", is_flag=True, help="Do not compile the kernels, which takes some seconds.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the findings here.")
def command(no_kernels: bool, json_file: Path | None) -> None:
    """Look at versions, GPU, driver, CuPy, NVRTC, kernels and memory; exit 1 if something is broken.

    Example:  pqcache doctor --json doctor.json
    """
    from hf_pqcache.diagnose import diagnose

    console = Console()
    with console.status("looking around") as status:
        findings = diagnose(lambda name: status.update(f"looked at {name}"), kernels=not no_kernels)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "finding"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(MARKS[finding.status], finding.name, finding.detail)
    console.print(table)
    for finding in (f for f in findings if f.fix):
        console.print(f"{finding.name}: {finding.fix}", markup=False, highlight=False, soft_wrap=True)
    broken = [finding.name for finding in findings if finding.status == "fail"]
    if json_file is not None:
        _options.save_json(json_file, [asdict(finding) for finding in findings])
    if broken:
        raise click.ClickException(f"broken: {', '.join(broken)}")
    click.echo("nothing is broken")
