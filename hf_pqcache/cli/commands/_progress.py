"""Progress bars of whatever library makes them: kept whole beside warnings and log lines, or all off; knows no command."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import click


@contextmanager
def tidy_bars() -> Iterator[None]:
    """Warnings are one line each; they and log lines come between bars, not into them."""
    emit = logging.StreamHandler.emit

    def emit_beside(self: Any, record: logging.LogRecord) -> None:
        with _between_bars():
            emit(self, record)

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        with _between_bars():
            click.echo(f"Warning: {' '.join(str(message).split())}", err=True)

    with patch.object(warnings, "showwarning", show), patch.object(logging.StreamHandler, "emit", emit_beside):
        yield


def _between_bars() -> AbstractContextManager[Any]:
    """Bars are taken away meanwhile."""
    if "tqdm" not in sys.modules:
        return nullcontext()
    from tqdm import tqdm

    return tqdm.external_write_mode()


@contextmanager
def no_bars() -> Iterator[None]:
    """No bar, whoever makes it and whatever it was told; no warning, and of log lines errors only."""
    from tqdm import tqdm

    make = tqdm.__init__

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "disable": True})

    with patch.object(tqdm, "__init__", disabled), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
