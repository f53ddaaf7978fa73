"""Progress bars of whatever library makes them: kept whole beside warnings and log lines, or all off; knows no command."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def tidy_bars() -> Iterator[None]:
    """Warnings and log lines come between bars, not into them."""

    def beside(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "tqdm" not in sys.modules:
                return write(*args, **kwargs)
            from tqdm import tqdm

            with tqdm.external_write_mode():
                return write(*args, **kwargs)

        return call

    with (
        patch.object(warnings, "showwarning", beside(warnings.showwarning)),
        patch.object(logging.StreamHandler, "emit", beside(logging.StreamHandler.emit)),
    ):
        yield


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
