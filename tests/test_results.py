"""Results: a row is found again, whatever stopped the process that wrote it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hf_pqcache.eval.session.results import Results, Row, provenance

ROW = Row("wikitext-2-raw-v1", "perplexity", 5.25, model="m", settings={"window": 64}, provenance={"time": "now"})


def test_key_is_what_was_measured_and_nothing_else() -> None:
    assert replace(ROW, value=7.0, provenance={}, true_bits=4.5).key == ROW.key
    for change in (
        {"task": "x"},
        {"metric": "x"},
        {"cache": "pq"},
        {"settings": {"window": 65}},
        {"codebook": "f"},
        {"seed": 1},
    ):
        assert replace(ROW, **change).key != ROW.key
    ordered, reordered = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert replace(ROW, settings=ordered).key == replace(ROW, settings=reordered).key


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "results.jsonl")
    other = replace(ROW, metric="kv_bytes", value=math.nan)
    results.add(ROW)
    results.add(other)
    again = Results(results.path)
    assert again.rows[0] == ROW
    assert math.isnan(again.rows[1].value)
    assert ROW.key in again
    assert replace(ROW, seed=9).key not in again


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).add(ROW)
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):  # the last: all but the line's end
        path.write_bytes(whole + whole[:cut])
        results = Results(path)
        assert results.rows == [ROW]
        results.add(replace(ROW, seed=1))
        assert [r.seed for r in Results(path).rows] == [0, 1]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("{broken\n" + json.dumps(ROW.to_dict()) + "\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        Results(path)
    path.write_text(json.dumps({**ROW.to_dict(), "colour": "blue"}) + "\n")
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        Results(path)


def test_a_repeated_measurement_replaces_the_old_one(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.add(ROW)
    results.add(replace(ROW, value=6.0))
    assert [row.value for row in Results(results.path).rows] == [6.0]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_provenance_names_versions_device_and_time() -> None:
    found = provenance(notes="by hand")
    assert found["versions"]["torch"]
    assert found["device"].startswith("cpu")
    assert found["time"].endswith("+00:00")
    assert found["notes"] == "by hand"
