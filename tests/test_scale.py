"""The plan for many conversations: its closed forms hold, the simulation agrees, and measured kernels are as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_pqcache import plan_memory
from hf_pqcache.cli import main
from hf_pqcache.config import PQConfig
from hf_pqcache.eval.scale import plan
from hf_pqcache.eval.scale.plan import TIERS, Card, Conversation, Use, answer, conversation, step_of, work
from hf_pqcache.eval.scale.simulation import simulate
from hf_pqcache.pages.layout import PageLayout

ROOT = Path(__file__).parents[1]
CARD = Card(memory=56e9, weights=16e9)
ONE = Conversation(own=1e9, common=0.0, launch=240e-6, attention=4e-4, question=0.01)
USE = Use(think=120.0)


def measured() -> list[tuple[str, float, float]]:
    """(bits, bytes of codes, microseconds) of every row of eval/RESULTS.md: decode attention, ours and fp16."""
    found, bits = [], ""
    for line in (ROOT / "eval" / "RESULTS.md").read_text().splitlines():
        if match := re.match(r"\| (\d+), (\d+), (\d+), (\d+) \| (\d bits)? ?\|(.*)\|$", line):
            batch, heads, _, tokens = (int(match[i]) for i in range(1, 5))
            bits = match[5] or bits
            cells = [cell.strip() for cell in match[6].split("|")]
            vectors = batch * heads * tokens
            shapes = [PageLayout(which, 64, 128, *PQConfig(bits=int(bits[0])).codes(which, 128)) for which in ("key", "value")]
            found.append((bits[0], vectors * sum(x.nbytes for x in shapes) / 64, float(cells[0])))
            found.append(("16", vectors * 512.0, float(cells[3])))
    return found


@pytest.mark.parametrize(("bits", "nbytes", "us"), measured())
def test_attention_takes_what_was_measured(bits: str, nbytes: float, us: float) -> None:
    assert plan.attention_of(int(bits), nbytes)[1] * 1e6 == pytest.approx(us, rel=0.2)


def test_all_operating_points_were_measured() -> None:
    assert {int(bits) for bits, _, _ in measured()} == set(plan.BITS)


def test_whole_steps_take_what_was_measured() -> None:
    """Of compiled `generate` at batch 1 with 32768 tokens, at 4, 3 and 2 bits (eval/RESULTS.md)."""
    row = r"^\| \*\*`bits=(\d)`\*\* \| \*\*([\d.]+)\*\* \| [\d.]+ \|"
    found = re.findall(row, (ROOT / "eval" / "RESULTS.md").read_text(), re.MULTILINE)
    assert {bits for bits, _ in found} == {"4", "3", "2"}
    card = plan.card_of(plan.llama_8b())
    for bits, ms in found:
        one = conversation(plan.llama_8b(), int(bits), Use(), card)
        assert 1e3 * step_of(card, one, 1.0) == pytest.approx(float(ms), rel=0.1)


def test_steps_of_the_serving_engine() -> None:
    """Nothing is fitted to them: requests, tokens of each, blocks, ms a token (eval/RESULTS.md)."""
    row = r"^\| (\d+), (\d+)[^|]*\| (4 bits|exact) \| \**\d+\** \| ([\d.]+) \|"
    found = re.findall(row, (ROOT / "eval" / "RESULTS.md").read_text(), re.MULTILINE)
    assert len(found) >= 4
    config, card = plan.llama_8b(), plan.card_of(plan.llama_8b())
    for requests, tokens, blocks, ms in found:
        one = conversation(config, 16 if blocks == "exact" else 4, Use(tokens=int(tokens)), card)
        assert 1e3 * step_of(card, one, float(requests)) == pytest.approx(float(ms), rel=0.22), (requests, tokens, blocks)


@pytest.mark.parametrize("count", [1, 10, 500, 2000, 10000])
def test_littles_law(count: int) -> None:
    decoding, turns, step = work(CARD, ONE, USE, count)
    assert decoding == pytest.approx(turns * USE.answer * step, rel=1e-6)
    assert count == pytest.approx(turns * (USE.think + USE.answer * step), rel=1e-6)
    assert step == pytest.approx(step_of(CARD, ONE, decoding, turns))


def test_bounds_in_closed_form() -> None:
    alone = answer(CARD, ONE, USE)
    assert (alone.conversations, alone.bound, alone.cards(10**6)) == (56, "device memory", -(-(10**6) // 56))
    on_host = answer(CARD, ONE, USE, "host")
    assert (on_host.conversations, on_host.bound) == (int(CARD.host / ONE.own), "host memory")
    slow = Card(memory=56e9, weights=16e9, disk_link=1e9)
    turns = plan.MOST_OF_LINK * slow.disk_link / ONE.own  # the link is full at so many turns a second
    on_disk = answer(slow, ONE, USE, "disk")
    assert on_disk.bound == "disk link"
    assert on_disk.turns == pytest.approx(turns, rel=0.02)
    assert on_disk.cost(slow, USE) == pytest.approx(1e6 * slow.price / (3600 * turns * USE.answer), rel=0.02)
    shared = Conversation(own=0.5e9, common=0.5e9, launch=240e-6, attention=4e-4, question=0.01)
    assert answer(CARD, shared, USE).conversations == int(55.5e9 / 0.5e9)
    assert answer(Card(memory=0.1e9, weights=16e9), shared, USE).conversations == 0


def test_conversations_take_what_caches_do() -> None:
    config, use = plan.llama_8b(), Use(shared=4096)
    card = plan.card_of(config, weights=16.06e9)
    for bits in plan.BITS:
        one = conversation(config, bits, use, card)
        planned = plan_memory(config, tokens=use.tokens)["dynamic" if bits == 16 else f"pq:{bits}"]
        assert one.own + one.common == planned.total
        assert 0 < one.common < planned.total / 7
    rows = plan.table(config, card, use)
    assert len(rows) == 4 * len(plan.BITS)
    for tier in range(4):
        cards = [row["cards"] for row in rows[4 * tier : 4 * tier + 4]]
        assert cards == sorted(cards, reverse=True)  # fewer bits, fewer cards


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("count", [1, 400, 2000])
def test_a_simulation_says_the_same(count: int, tier: str) -> None:
    card = Card(memory=56e9, weights=16e9, disk_link=4e10)
    decoding, turns, step = work(card, ONE, USE, count, tier)
    seen = simulate(card, ONE, USE, count, tier, seconds=12000.0 if count == 1 else 1200.0)
    rel = 0.35 if count == 1 else 0.12  # of one person's some eighty turns
    assert seen.turns == pytest.approx(turns, rel=rel)
    assert seen.decoding == pytest.approx(decoding, rel=rel)
    if count == 2000:
        assert seen.step == pytest.approx(step, rel=0.07)
    if tier == "host":
        assert seen.link == pytest.approx(turns * ONE.own / card.host_link, rel=rel)


def test_the_command(tmp_path: Path) -> None:
    options = ["--tokens", "2K", "--shared", "512", "--conversations", "1000", "--simulate"]
    done = CliRunner().invoke(main, ["scale", "tiny", *options, "--plot", f"{tmp_path}/a.svg", "--json", f"{tmp_path}/a.json"])
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 16
    for wrong in (["--shared", "4K", "--tokens", "4K"], ["--memory", "1"]):
        done = CliRunner().invoke(main, ["scale", *wrong])
        assert done.exit_code == 2
        assert "Error" in done.output


def test_the_page_has_the_table() -> None:
    """eval/SCALE.md is what the command says."""
    page = (ROOT / "eval" / "SCALE.md").read_text()
    config = plan.llama_8b()
    for row in plan.table(config, plan.card_of(config), Use(shared=4096)):
        cells = (f"{row['per_card']:,}", f"{row['cards']:,}", f"{row['cost']:.2f}")
        line = next(x for x in page.splitlines() if x.startswith(f"| {row['where']} | {row['bits']} |"))
        assert all(f" {cell} |" in line for cell in cells), (line, cells)
