"""`pqcache selftest`: does what is installed work on this machine? One line a check, one pass/fail line, an exit code."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_pqcache.cli.commands import _options, _output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from hf_pqcache.eval.selftest.checks import Machine, Outcome
    from hf_pqcache.eval.selftest.timing import Figures

MARKS = {"ok": "[green]ok[/]     ", "skipped": "[yellow]skipped[/]", "FAILED": "[red]FAILED[/] "}


@click.command()
@click.option("--quick", "mode", flag_value="quick", default="quick", help="Checks of some shapes: half a minute. The default.")
@click.option("--full", "mode", flag_value="full", help="All shapes, longer runs, and the two below.")
@click.option("--performance", "mode", flag_value="performance", help="Time decoding against transformers' exact caches.")
@click.option("--compare", "mode", flag_value="compare", help="Bytes, speed and tokens of other compressed caches, too.")
@click.option("--phase", type=click.IntRange(1, 3), help="Only 1 data structures, 2 kernels or 3 integration.")
@click.option("--debug", is_flag=True, help="Show where a check failed.")
@_options.json_option("the outcomes")
def command(mode: str, phase: int | None, debug: bool, json_file: Path | None) -> None:
    """Check data structures, kernels and generate on this machine, offline; exit 1 if something fails.

    \b
    Example:  pqcache selftest --quick --phase 1
    """
    from hf_pqcache.eval import selftest
    from hf_pqcache.eval.selftest.checks import Machine, run_checks
    from hf_pqcache.eval.session.results import provenance

    if phase is not None and mode in ("performance", "compare"):
        raise click.UsageError(f"--phase chooses among the checks and --{mode} runs none of them; give one of the two")
    machine = Machine.here(is_full=mode == "full")
    checks = [check for check in selftest.CHECKS if phase in (None, check.phase) and mode in ("quick", "full")]
    console = _output.console()
    outcomes: list[Outcome] = []
    figures: list[Figures] = []
    with console.status("") as status:
        for outcome in run_checks(checks, machine, status.update):
            if not outcomes or outcomes[-1].phase != outcome.phase:
                console.print(f"{outcome.phase} {selftest.PHASES[outcome.phase]}", style="bold")
            outcomes.append(outcome)
            _print_outcome(console, outcome, debug)
    for kind in ("performance", "compare"):
        if mode == kind or (mode == "full" and phase is None):
            found, outcome = _time(kind, machine, console)
            figures += found
            outcomes.append(outcome)
            _print_outcome(console, outcome, debug)
    if json_file is not None:
        report = {"mode": mode, "outcomes": [asdict(x) for x in outcomes], "caches": [asdict(x) for x in figures]}
        _output.write_json(json_file, {**report, "provenance": provenance(machine.device)})
    _finish(outcomes)


def _print_outcome(console: Console, outcome: Outcome, debug: bool) -> None:
    from rich.markup import escape

    mark = MARKS[outcome.status]
    console.print(
        f"  {mark} {escape(outcome.name)} [dim]{outcome.seconds:.1f} s  {escape(outcome.detail)}[/]",
        highlight=False,
        soft_wrap=True,
    )
    if outcome.status != "FAILED":
        return
    for title, text in (("expected", outcome.expected), ("got", outcome.got), ("what to do", outcome.fix)):
        console.print(f"          {title}: {text}", markup=False, highlight=False, soft_wrap=True)
    if debug:
        console.print(outcome.traceback, markup=False, highlight=False, soft_wrap=True)


def _time(kind: str, machine: Machine, console: Console) -> tuple[list[Figures], Outcome]:
    """Measure the caches of --performance or --compare and print their table."""
    from hf_pqcache.eval.selftest import timing
    from hf_pqcache.eval.selftest.checks import Check, run_checks

    names = timing.PERFORMANCE if kind == "performance" else timing.COMPARISON
    figures: list[Figures] = []

    def run(machine: Machine) -> str:
        figures.extend(timing.measure(names, machine))
        return f"{sum(not x.note for x in figures)} caches"

    with console.status("timing caches"):
        (outcome,) = run_checks([Check(kind, 3, run)], machine)

    def texts(name: str, form: str) -> list[str]:
        values = [getattr(x, name) for x in figures]
        return ["" if value is None else format(value, form) for value in values]

    _output.show_table(
        f"embedded model on {machine.device.type}: {timing.TOKENS} tokens and {timing.NEW_TOKENS} more",
        {
            "cache": [x.cache for x in figures],
            "KV": [_output.bytes_text(x.kv_bytes) for x in figures],
            "TTFT ms": texts("ttft_ms", ".0f"),
            "tokens/s": texts("tokens_per_s", ".1f"),
            "as DynamicCache": texts("agreement", ".0%"),
        },
        notes=[f"{x.cache}: {x.note}" for x in figures if x.note],
    )
    return figures, outcome


def _finish(outcomes: Sequence[Outcome]) -> None:
    """The last line. Raises ClickException, hence exit code 1, if a check failed."""
    failed = [x.name for x in outcomes if x.status == "FAILED"]
    skipped = sum(x.status == "skipped" for x in outcomes)
    seconds = sum(x.seconds for x in outcomes)
    if failed:
        raise click.ClickException(f"selftest FAILED: {', '.join(failed)} ({len(failed)} of {len(outcomes)} checks)")
    _output.say(f"selftest passed: {len(outcomes) - skipped} checks, {skipped} skipped, {seconds:.0f} s")
