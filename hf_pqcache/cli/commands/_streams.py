"""Texts that grow side by side: in columns of a wide terminal, else in labelled lines that take turns; knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from hf_pqcache.cli.commands import _output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Columns of a terminal on which two texts fit beside each other.
WIDE = 100


class Streams(Protocol):
    def show(self, i: int, piece: str) -> None:
        """Go on with text number `i`."""


@contextmanager
def side_by_side(labels: Sequence[str]) -> Iterator[Streams]:
    """Texts with these labels, until the end of the block."""
    console = _output.console()
    if console.is_terminal and console.width >= WIDE and len(labels) > 1:
        columns = _Columns(labels, console)
        with columns:
            yield columns
    else:
        lines = _Lines(labels, console.width)
        yield lines
        lines.end()


class _Lines:
    """Whole lines, each with its label, as soon as they are full: what several write at a time stays legible in a pipe."""

    def __init__(self, labels: Sequence[str], width: int) -> None:
        longest = max(map(len, labels))
        self.heads = [f"{label:{longest}} | " for label in labels]
        self.room = max(20, width - longest - 3)
        self.waiting = [""] * len(labels)

    def show(self, i: int, piece: str) -> None:
        self.waiting[i] += piece
        while (cut := self._cut(self.waiting[i])) is not None:
            self._say(i, self.waiting[i][:cut])
            self.waiting[i] = self.waiting[i][cut:].removeprefix("\n" if self.waiting[i][cut : cut + 1] == "\n" else " ")

    def end(self) -> None:
        for i, rest in enumerate(self.waiting):
            if rest:
                self._say(i, rest)

    def _cut(self, text: str) -> int | None:
        """Where a line of it ends; None if it may still grow."""
        end = text.find("\n")
        if 0 <= end <= self.room:
            return end
        if len(text) <= self.room:
            return None
        space = text.rfind(" ", 1, self.room + 1)
        return space if space > 0 else self.room

    def _say(self, i: int, line: str) -> None:
        _output.say(self.heads[i] + line)


class _Columns:
    """A column each, redrawn as they grow: of texts that are longer than the screen the ends, and all of them at the end."""

    def __init__(self, labels: Sequence[str], console: Console) -> None:
        from rich.live import Live

        self.labels, self.console = labels, console
        self.texts = [""] * len(labels)
        self.live = Live(console=console, transient=True, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> None:
        self.live.start()

    def __exit__(self, *error: object) -> None:
        self.live.stop()
        self.console.print(self._table(None))

    def show(self, i: int, piece: str) -> None:
        self.texts[i] += piece
        self.live.update(self._table(max(3, self.console.height - 4)), refresh=True)

    def _table(self, most: int | None) -> Table:
        """The texts, or the last `most` lines of each."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        width = self.console.width // len(self.labels) - 4
        cells = []
        for label, text in zip(self.labels, self.texts, strict=True):
            table.add_column(label, ratio=1, overflow="fold")
            lines = Text(text).wrap(self.console, width)
            cells.append(Text("\n").join(lines if most is None else lines[-most:]))
        table.add_row(*cells)
        return table
