"""The README's list of refusals and limits: it is complete, and each line is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import ENTRIES, Entry, table

pytestmark = pytest.mark.usefixtures("one_thread")
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.what)
def test_it_is_so(entry: Entry) -> None:
    entry.check()


def test_the_readme_has_the_table() -> None:
    assert table() in README.read_text(encoding="utf-8"), "`python tests/helpers/refusals.py` prints it"
