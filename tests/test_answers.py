"""`pqcache generate`: the answers are generate's own, they stream, and figures stand beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hf_pqcache import demo
from hf_pqcache.cli import main
from hf_pqcache.eval.measure.answers import answer, prompt_ids, same_tokens
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
