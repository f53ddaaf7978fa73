"""The list of refusals and limits, hf_pqcache/cache/REFUSALS.md: it is complete, and each line is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import ENTRIES, Entry, table

pytestmark = pytest.mark.usefixtures("one_thread")
LIST = Path(__file__).parents[1] / "hf_pqcache" / "cache" / "REFUSALS.md"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.what)
def test_it_is_so(entry: Entry) -> None:
    entry.check()


def test_the_list_has_the_table() -> None:
    assert table() in LIST.read_text(encoding="utf-8"), "`python tests/helpers/refusals.py` prints it"
