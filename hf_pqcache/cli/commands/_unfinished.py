"""Keeps the rows of a command that has no --results on disk until it has shown them; knows no measurement.

Whatever ends the command before (Ctrl-C, an error, a kill) leaves the file, and where the command can, it says how to go on.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import click

from hf_pqcache.cli.commands import _output

if TYPE_CHECKING:
    from hf_pqcache.eval.session.results import Results

_KEY = "hf_pqcache.unfinished"


class Unfinished:
    """Rows so far, in the file that was asked for or in a spare one of the current folder.

    Attributes:
        path: None where not even a spare file can be made. results: what was measured; None before that begins.
    """

    def __init__(self, asked: Path | None) -> None:
        self.is_spare = asked is None
        self.path = asked if asked is not None or _is_one_of_several() else _spare()
        self.results: Results | None = None

    def begin(self, results: Results) -> None:
        self.results, self.found = results, len(results)

    def told(self) -> str:
        """How to go on from here; "" if there is nothing to go on from."""
        measured = 0 if self.results is None else len(self.results) - self.found
        if self.path is None or not measured or not self.path.exists():
            return ""
        rows = f"{measured} row{'s are' if measured > 1 else ' is'} in {self.path}"
        if self.is_spare:
            return f"{rows}: the same command with --results {self.path} goes on after {'them' if measured > 1 else 'it'}"
        return f"{rows}: the same command (without --force) goes on after {'them' if measured > 1 else 'it'}"

    def forget(self) -> None:
        """Remove the spare file: its rows have been shown."""
        if self.is_spare and self.path is not None:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.path.with_suffix(".predictions"), ignore_errors=True)
            self.results = None


def begin(asked: Path | None) -> Unfinished:
    """Keep the rows of the command that runs; `asked` is its --results."""
    found = Unfinished(asked)
    click.get_current_context().meta[_KEY] = found
    return found


def finished() -> None:
    """All rows of the command that runs have been shown."""
    context = click.get_current_context(silent=True)
    if context is not None and _KEY in context.meta:
        context.meta[_KEY].forget()


def told(context: click.Context) -> str:
    """How a command that was stopped goes on; "" if it left nothing."""
    found = context.meta.get(_KEY)
    return "" if found is None else found.told()


def _is_one_of_several() -> bool:
    """Under `accelerate launch`: its processes have no spare file in common."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _spare() -> Path | None:
    """A file in the current folder that this process alone has; None where none can be made."""
    try:
        with TemporaryFile(dir="."):
            return Path(f"pqcache-unfinished-{os.getpid()}.jsonl")
    except OSError:
        return None


def note(context: click.Context) -> None:
    """Say it, where there is something to say."""
    if text := told(context):
        _output.note(text)
