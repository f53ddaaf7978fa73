"""`pqcache doctor`: what works on this machine, and the line that mends what does not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_pqcache.commands import _options

if TYPE_CHECKING:
    from hf_pqcache.diagnose import Finding

MARKS = {"ok": ("ok", "green"), "note": ("--", "yellow"), "fail": ("FAIL", "red")}
_NAME_WIDTH = 21


def _print(finding: Finding) -> None:
    """One finding, as soon as it is there: in a terminal and in a pipe."""
    mark, colour = MARKS[finding.status]
    text = click.wrap_text(finding.detail, 80, " " * (_NAME_WIDTH + 6), " " * (_NAME_WIDTH + 6)).strip()
    click.echo(f"{click.style(f'{mark:4}', fg=colour)} {finding.name:{_NAME_WIDTH}} {text}")
    if finding.fix:
        click.echo(f"     {finding.fix}")


@click.command(context_settings=_options.CONTEXT)
@click.option("--no-kernels", is_flag=True, help="Do not compile the kernels, which takes some seconds.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the findings here.")
def command(no_kernels: bool, json_file: Path | None) -> None:
    """Look at versions, GPU, driver, kernels and memory; exit 1 if something is broken.

    Example:  pqcache doctor --json doctor.json
    """
    from hf_pqcache.diagnose import diagnose

    findings = diagnose(_print, kernels=not no_kernels)
    broken = [finding.name for finding in findings if finding.status == "fail"]
    if json_file is not None:
        _options.save_json(json_file, [asdict(finding) for finding in findings])
    if broken:
        raise click.ClickException(f"broken: {', '.join(broken)}")
    click.echo("nothing is broken")
