"""How commands speak: tables that fit any terminal, notes, JSON to a file or to the output; knows no measurement."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

#: In `ctx.meta`, once --json - asks for the output: all else goes to the other stream.
JSON_TO_OUTPUT = "hf_pqcache.json_to_output"
STDOUT = Path("-")
#: Width where no terminal says its own.
WIDTH = 80
_LEAST_TEXT = 24


def speaks_beside_json() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(JSON_TO_OUTPUT))


def say(text: str) -> None:
    """A line for people; not in the way of --json -."""
    click.echo(text, err=speaks_beside_json())


def note(text: str) -> None:
    """What a user should know besides the results: on the error stream, above any progress bar."""
    if "tqdm" not in sys.modules:
        click.echo(text, err=True)
        return
    from tqdm import tqdm

    with tqdm.external_write_mode():
        click.echo(text, err=True)


def console() -> Console:
    """For people: as wide as the terminal (or COLUMNS says), 80 columns in a file or a pipe."""
    from rich.console import Console

    width = shutil.get_terminal_size((WIDTH, 24)).columns
    return Console(width=width, stderr=speaks_beside_json(), highlight=False, soft_wrap=False)


def show_table(
    title: str,
    columns: Mapping[str, Sequence[str]],
    *,
    left: Sequence[str] = (),
    styles: Sequence[str | None] = (),
    notes: Sequence[str] = (),
) -> None:
    """Print a table. Where its columns do not fit beside each other, it goes on below, each part with the first column.

    Args:
        columns: texts by heading; the first one names the lines. Columns without any text are left out.
        left: headings whose texts are words, not numbers; such a column may wrap. The first one is always of them.
        styles: rich's style of each line.
        notes: lines below.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table

    output = console()
    first = next(iter(columns))
    shown = {heading: texts for heading, texts in columns.items() if any(texts) or heading == first}
    others = list(shown)[1:]
    widths = {h: max([cell_len(h), *map(cell_len, shown[h])]) for h in shown}
    for heading in (h for h in others if h in left):
        widths[heading] = min(widths[heading], _LEAST_TEXT)  # the least: it takes what room there is
    room = output.width - 2
    widths[first] = min(widths[first], max(_LEAST_TEXT, room // 2))
    parts: list[list[str]] = [[]]
    taken = widths[first]
    for heading in others:
        if parts[-1] and taken + widths[heading] + 2 > room:
            parts.append([])
            taken = widths[first]
        parts[-1].append(heading)
        taken += widths[heading] + 2
    output.print(title, style="bold", markup=False)
    for part in parts if others else []:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for heading in (first, *part):
            is_text = heading == first or heading in left
            table.add_column(heading, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
        for i, texts in enumerate(zip(*(shown[h] for h in (first, *part)), strict=True)):
            table.add_row(*texts, style=styles[i] if styles else None)
        output.print(table)
        output.print()
    for line in notes:
        output.print(line, style="dim", markup=False)


def bytes_text(number: float | None) -> str:
    """Bytes as people read them: 12.02 MiB."""
    from hf_pqcache.eval.report.naming import format_value

    return "" if number is None else format_value(number, "bytes")


def check_writable(path: Path | None) -> None:
    """Raises OSError if no file or folder can be made at `path`, or the file there not be written; leaves nothing behind."""
    if path is None or path == STDOUT:
        return
    if path.is_file():
        with open(path, "ab"):
            return
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file")
    with TemporaryFile(dir=folder):
        pass


def save_json(path: Path, document: Any) -> bool:
    """Write JSON to a file, its folder included, or to the output (-) -> whether a file of that name was replaced."""
    text = json.dumps(document, indent=2) + "\n"
    if path == STDOUT:
        click.echo(text, nl=False)
        return False
    return save_text(path, text)


def save_text(path: Path, text: str) -> bool:
    """Write a file, its folder included -> whether a file of that name was replaced."""
    return save_bytes(path, text.encode())


def save_bytes(path: Path, data: bytes) -> bool:
    """The same of a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    was_there = path.exists()
    path.write_bytes(data)
    return was_there


def write_json(path: Path | None, document: Any) -> None:
    """Save, and say where and over what; nothing without a path."""
    if path is None:
        return
    was_there = save_json(path, document)
    if path != STDOUT:
        say(written(path, was_there))


def written(path: Path, was_there: bool) -> str:
    return f"written to {path}" + (", over the one that was there" if was_there else "")
