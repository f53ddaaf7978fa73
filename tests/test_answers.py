"""`pqcache generate`: the answers are generate's own, they stream, and figures stand beside them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hf_pqcache import demo
from hf_pqcache.cli import main
from hf_pqcache.cli.commands import _streams
from hf_pqcache.eval.measure.answers import answer, answers, prompt_ids, same_tokens
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(demo.MODEL, dtype="float32", device="cpu")


@pytest.mark.parametrize("cache", ["dynamic", "paged-kv", "pq"])
def test_an_answer_is_what_generate_gives(cache: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "The owl is a bird of"}], use_template=False)
    pieces: list[str] = []
    found = answer(model, tokenizer, ids, CacheSpec.parse(cache, 64), max_new_tokens=12, show=pieces.append)
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert found.tokens == expected
    assert "".join(pieces) == found.text
    assert len(pieces) > 3
    assert found.first_s > 0
    assert found.tokens_per_s is not None
    assert found.kv_bytes > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_side_by_side_are_those_that_each_gives_alone(temperature: float, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    asked = [
        (prompt_ids(tokenizer, [{"role": "user", "content": text}], use_template=False), CacheSpec.parse(cache, 64))
        for text, cache in (("The owl is a bird of", "dynamic"), ("Oaks are", "paged-kv"), ("The owl is", "pq"))
    ]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
    order: list[int] = []
    together = answers(model, tokenizer, asked, show=lambda i, piece: order.append(i), **options)
    alone = [answer(model, tokenizer, *one, **options) for one in asked]
    assert [x.tokens for x in together] == [x.tokens for x in alone]
    assert order != sorted(order), "they stream in turn"
    assert {order.index(i) for i in range(3)} <= set(range(6)), "all have begun before one is done"


@pytest.mark.parametrize("broken", [0, 1])
def test_an_answer_that_fails_ends_the_other(broken: int, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "The owl"}], use_template=False)

    def show(i: int, piece: str) -> None:
        if i == broken:
            raise KeyError("this one fails")

    with pytest.raises(KeyError, match="this one fails"):
        answers(model, tokenizer, [(ids, CacheSpec("dynamic"))] * 2, max_new_tokens=8, show=show)


def test_in_a_pipe_labelled_lines_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "generate --model tiny --cache paged-kv --prompt Owls --max-new-tokens 60 --quiet --json answers.json"
    done = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert max(map(len, done.output.splitlines())) <= 80
    lines = [line.split(" | ", 1) for line in done.output.splitlines() if " | " in line]
    labels = [label.strip() for label, _ in lines]
    assert labels[:4] == ["dynamic", "paged-kv", "dynamic", "paged-kv"]
    for answered in json.loads(Path("answers.json").read_text())["turns"][0]:
        told = "".join(text for label, text in lines if label.strip() == answered["cache"])
        assert "".join(told.split()) == "".join(answered["text"].split())


def test_on_a_wide_terminal_texts_stand_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    screen = Console(width=120, height=12, force_terminal=True, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(_streams._output, "console", lambda: screen)
    with _streams.side_by_side(["exact", "pq"]) as streams:
        for i in range(60):
            streams.show(0, f"left{i} ")
            streams.show(1, f"right{i} ")
    *_, last = screen.file.getvalue().split("exact")  # type: ignore[attr-defined]
    assert any("left1 " in line and "right1 " in line for line in last.splitlines())
    assert all(f"left{i} " in last and f"right{i} " in last for i in range(60)), "the end shows all, however tall the screen"


def test_same_tokens_counts_until_answers_part() -> None:
    assert same_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert same_tokens([1, 2], [1, 2, 3]) == 2
    assert same_tokens([], [1]) == 0


def test_a_chat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "generate --model tiny --cache paged-kv --chat --max-new-tokens 3 --json chat.json --quiet"
    done = CliRunner().invoke(main, line.split(), input="Owls eat\nAnd bats\n\nnever read\n", catch_exceptions=False)
    assert done.exit_code == 0, done.output
    first, second = json.loads(Path("chat.json").read_text())["turns"]
    assert [x["cache"] for x in first] == ["dynamic", "paged-kv"]
    assert second[0]["prompt_tokens"] > first[0]["prompt_tokens"] + 3
    assert first[0]["tokens"] == first[1]["tokens"]


def test_a_prompt_from_a_file_and_from_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text("Oaks are", encoding="utf-8")
    common = "generate --model tiny --cache dynamic --max-new-tokens 2 --quiet --json - --file"
    texts = [
        json.loads(CliRunner().invoke(main, [*common.split(), file], input="Oaks are").stdout)["turns"][0][0]["text"]
        for file in ("prompt.txt", "-")
    ]
    assert texts[0] == texts[1]


def test_model_arguments_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(demo.MODEL, device="cpu", attn_implementation="eager", model_kwargs={"attention_dropout": 0.5})
    assert model.config._attn_implementation == "eager"
    assert model.config.attention_dropout == 0.5
    for options, message in (
        ("--quantization bnb-4bit", "bitsandbytes"),
        ("--model-kwargs nonsense", "name=value"),
        ("--attn-implementation magic", "magic"),
        ("--device-map {", "JSON"),
    ):
        line = f"generate --model tiny --cache dynamic --prompt x --max-new-tokens 1 --quiet {options}"
        done = CliRunner().invoke(main, line.split())
        assert done.exit_code in (1, 2), options
        assert message in done.output, done.output
        assert done.output.count("\n") == 1
