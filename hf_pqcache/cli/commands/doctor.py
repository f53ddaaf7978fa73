"""`pqcache doctor`: what works on this machine, and the line that mends what does not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_pqcache.cli.commands import _options, _output

if TYPE_CHECKING:
    from hf_pqcache.backends.diagnose import Finding

MARKS = {"ok": ("ok", "green"), "note": ("--", "yellow"), "fail": ("FAIL", "red")}
_NAME_WIDTH = 21


def _print(finding: Finding) -> None:
    """One finding, as soon as it is there: in a terminal and in a pipe."""
    mark, colour = MARKS[finding.status]
    text = click.wrap_text(finding.detail, 80, " " * (_NAME_WIDTH + 6), " " * (_NAME_WIDTH + 6)).strip()
    _output.say(f"{click.style(f'{mark:4}', fg=colour)} {finding.name:{_NAME_WIDTH}} {text}")
    if finding.fix:
        _output.say(f"     {finding.fix}")


@click.command()
@click.option("--no-kernels", is_flag=True, help="Do not compile the kernels, which takes some seconds.")
@click.option("--serve", "serves", is_flag=True, help="Also whether this machine can serve: packages, the engine, a request.")
@_options.json_option("the findings")
def command(no_kernels: bool, serves: bool, json_file: Path | None) -> None:
    """Look at versions, GPU, driver, kernels and memory; exit 1 if something is broken.

    \b
    Example:  pqcache doctor --no-kernels --serve --json doctor.json
    """
    from hf_pqcache.backends.diagnose import diagnose

    findings = diagnose(_print, kernels=not no_kernels)
    if serves:
        from hf_pqcache.serve import diagnose as serving

        for finding in serving.diagnose():
            findings.append(finding)
            _print(finding)
    broken = [finding.name for finding in findings if finding.status == "fail"]
    if json_file is not None:
        _output.save_json(json_file, [asdict(finding) for finding in findings])
    if broken:
        raise click.ClickException(f"broken: {', '.join(broken)}")
    _output.say("nothing is broken")
