"""What operators see of a server: lines without prompts, a dashboard of figures that there are, a doctor that asks it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("prometheus_client")
from served import eventually, served

from hf_pqcache.cli import main
from hf_pqcache.serve import diagnose, log
from hf_pqcache.serve.metrics import COUNTERS, GAUGES, Metrics

pytestmark = pytest.mark.usefixtures("one_thread")
DASHBOARD = Path(log.__file__).with_name("grafana.json")
SECRET = "a word that nobody must read"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    level, handlers = log.LOGGER.level, list(log.LOGGER.handlers)
    log.start(stream)
    yield stream
    log.LOGGER.setLevel(level)
    log.LOGGER.handlers[:] = handlers


def test_lines_say_what_happened_and_no_prompt(lines: io.StringIO) -> None:
    with served(api_key=SECRET) as server:
        server.client.headers["authorization"] = f"Bearer {SECRET}"
        server.completions(prompt=SECRET, max_tokens=6, temperature=0, user=SECRET)
        server.events(prompt=SECRET, max_tokens=6, temperature=0)
        server.completions(prompt=SECRET, max_tokens=10**6)
        server.client.get(f"/v1/{SECRET}")
        server.client.get("/health")
        server.drain()
    text = lines.getvalue()
    assert SECRET not in text
    told = [json.loads(line) for line in text.splitlines()]
    assert {line["event"] for line in told} == {"ready", "http", "request", "draining"}
    assert [line["status"] for line in told if line["event"] == "http"] == [200, 200, 400, 404]
    answered = [line for line in told if line["event"] == "request"]
    assert [line["tokens"] for line in answered] == [6, 6]
    for line in answered:
        assert line["outcome"] == "length"
        assert 0 < line["first_s"] <= line["seconds"]
        assert line["prompt_tokens"] > 3


def test_nothing_is_written_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    log.tell("request", tokens=1)
    assert capfd.readouterr() == ("", "")


def test_a_dashboard_asks_for_figures_that_there_are() -> None:
    figures = Metrics(lambda: dict.fromkeys([*GAUGES, *COUNTERS], 1.0), lambda: {"blocks": "4"})
    figures.ended("stop", 0.0, 0.1, 0.5, 3)
    figures.responses.labels("/health", "200").inc()
    there = set(re.findall(r"^(pqcache_\w+)", figures.text().decode(), re.MULTILINE))
    document = json.loads(DASHBOARD.read_text())
    asked = {name for panel in document["panels"] for t in panel["targets"] for name in re.findall(r"pqcache_\w+", t["expr"])}
    assert asked <= there
    families = {name for name in there if not name.endswith(("_created", "_bucket", "_count", "_sum"))}
    missing = {name for name in families if not any(one.startswith(name) for one in asked)}
    assert missing == set(), "show them, too"
    places = [tuple(panel["gridPos"].values()) for panel in document["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in document["panels"]}) == len(places)


def test_figures_of_memory() -> None:
    text = Metrics(dict).text().decode()
    assert re.search(r"^pqcache_process_memory_bytes \d\.\d+e\+0[89]", text, re.MULTILINE)


@pytest.mark.parametrize("variant", ["4", "stock"])
def test_what_a_request_has_and_leaves_empty(variant: str) -> None:
    body = {"prompt": "The owl", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with served(variant=variant) as server:
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # thrown away, it would end the request
            next(lines)
            names = ("pqcache_request_empty_bytes ", "pqcache_request_bytes ")  # of which once in a page nothing is empty
            assert eventually(lambda: 0 < server.metric(names[0]) < server.metric(names[1]))
            found = dict(re.findall(r"^(pqcache_\w+) (.*)$", server.client.get("/metrics").text, re.MULTILINE))
        assert found.get("pqcache_slots_used") == ("1.0" if variant == "4" else None)
        assert eventually(lambda: server.metric("pqcache_request_bytes") == 0)


def test_a_doctor_asks_a_server() -> None:
    found = {finding.name: finding for finding in diagnose.diagnose()}
    assert {finding.status for finding in found.values()} <= {"ok", "note"}
    assert found["a request"].detail.startswith("8 tokens of the embedded model")


def test_a_doctor_names_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "PACKAGES", ("no_such_package",))
    result = CliRunner().invoke(main, ["doctor", "--no-kernels", "--serve"])
    assert result.exit_code == 1
    assert "pip install 'hf-pqcache[serve]'" in result.output
    assert "broken: no_such_package" in result.output
