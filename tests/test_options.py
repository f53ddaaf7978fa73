"""What the command line takes it heeds, and what would mean nothing it refuses before a model is loaded."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from checkpoints import done, gpt2, llama, pqcache, save

from hf_pqcache import demo
from hf_pqcache.cli import main
from hf_pqcache.eval.session import models
from hf_pqcache.eval.session.results import Results

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATE = ("calibrate", "--nbits", 4, "--calibration-tokens", 200, "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama/ and gpt2/ with 256 positions, texts, cb/, a codebook of the Llama (M=8, 4 bits, pages of 32), and old/, one of an
    older version."""
    root = tmp_path_factory.mktemp("options")
    save(llama(), root / "llama")
    save(gpt2(), root / "gpt2")
    words = demo.TEXT.read_text(encoding="utf-8").split()
    for name, part in (("train", words[:600]), ("test", words[600:1400])):
        (root / f"ptb.{name}.txt").write_text(" ".join(part))
    (root / "short.txt").write_text(" ".join(words[:20]))
    (root / "long.txt").write_text(" ".join(words[1400:2400]))
    (root / "latin.txt").write_bytes(b"caf\xe9")
    done(*CALIBRATE, "--model", root / "llama", "--page-size", 32, "-o", root / "cb")
    description = json.loads((root / "cb" / "codebook.json").read_text())
    shutil.copytree(root / "cb", root / "old")
    (root / "old" / "codebook.json").write_text(json.dumps({**description, "schema_version": 1}))
    return root


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may load a model's weights."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were loaded before the command line was checked")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", refuse)


def facts(folder: Path, *options: object) -> dict[str, Any]:
    done(*CALIBRATE, "--model", folder / "llama", "-o", folder / "made", *options)
    found: dict[str, Any] = json.loads((folder / "made" / "codebook.json").read_text())
    return {key: value for key, value in found.items() if key != "metadata"} | {"seed": found["metadata"]["seed"]}


@pytest.mark.parametrize(
    "option",
    [
        ("-M", 16),
        ("--nbits", 5),
        ("--value-subspaces", 16),
        ("--value-nbits", 5),
        ("--page-size", 16),
        ("--extended-residual", 64),
        ("--sink-tokens", 8),
        ("--calibration", "LONG"),
        ("--calibration-tokens", 100),
        ("--seed", 1),
        ("--dtype", "bfloat16"),
    ],
    ids=lambda option: option[0],
)
def test_every_option_of_calibrate_changes_the_codebook(folder: Path, option: tuple[object, ...]) -> None:
    option = tuple(folder / "long.txt" if part == "LONG" else part for part in option)
    assert facts(folder, *option) != facts(folder)


def test_a_codebooks_own_settings_are_heeded(folder: Path, tmp_path: Path) -> None:
    line = ("eval", "ptb", "--model", folder / "llama", "--data-dir", folder, "--window", 64, "--limit", 1, "--device", "cpu")
    line += ("--cache", "pq", "--codebook", folder / "cb", "--results", tmp_path / "rows.jsonl", "--quiet")
    done(*line)
    done(*line, "--page-size", 16)
    done(*line, "-M", 8, "--nbits", 4)  # what it has may be said
    assert [row.cache_config["page_size"] for row in Results(tmp_path / "rows.jsonl").rows] == [32, 16]
    published = done("publish", folder / "cb", "--repo", "a/b", "--license", "mit", "--dry-run", tmp_path / "out")
    assert "README.md" in published.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "page size 32" in card


#: (arguments, part of the message); MODEL, GPT2, DIR, CB, OLD, LONG, SHORT stand for what `folder` has.
REFUSED: list[tuple[str, str]] = [
    # Options that the cache does not heed.
    ("eval memory --model MODEL --cache dynamic -M 8", "-M does nothing for dynamic"),
    ("eval memory --model MODEL --cache hqq:4 --nbits 8", "--nbits does nothing"),
    ("eval memory --model MODEL --cache static --page-size 32", "--page-size does nothing"),
    ("eval memory --model MODEL --cache quanto --max-pages 32", "--max-pages does nothing"),
    ("eval memory --model MODEL --cache paged-kv --extended-residual 64", "--extended-residual does nothing"),
    ("eval memory --model MODEL --cache fp8 --sink-tokens 2", "--sink-tokens does nothing"),
    ("eval memory --model MODEL --cache pq:4 -M 8", "bits after the colon"),
    ("eval memory --model MODEL --cache dynamic --codebook CB", "--codebook does nothing"),
    ("eval memory --model MODEL --cache dynamic --calibration LONG", "--calibration does nothing"),
    ("eval memory --model MODEL --cache dynamic --calibration-tokens 300", "--calibration-tokens does nothing"),
    ("eval memory --model MODEL --cache pq:4 --bits 3", "bits after the colon"),
    ("eval memory --model MODEL --cache pq:4 --value-nbits 8", "bits after the colon"),
    ("eval memory --model MODEL --cache dynamic --value-subspaces 8", "--value-subspaces does nothing for dynamic"),
    ("eval memory --model MODEL --calibration-tokens 300", "--calibration-tokens does nothing without --calibration"),
    ("eval memory --model MODEL --codebook OLD", "caches need no codebook any more"),
    ("eval memory --model MODEL --codebook CB --value-nbits 8", "the codebook decides"),
    ("eval memory --model MODEL --codebook CB --bits 2", "the codebook decides"),
    ("eval memory --model MODEL --codebook CB -M 16", "the codebook decides"),
    ("eval memory --model MODEL --codebook CB --nbits 8", "the codebook decides"),
    ("eval memory --model MODEL --codebook CB --cache pq:4", "the codebook decides"),
    ("eval memory --model MODEL --codebook CB --calibration LONG", "beside a codebook"),
    ("eval memory --model MODEL --codebook CB --calibration-tokens 300", "beside a codebook"),
    ("eval memory --model MODEL --codebook CB --page-size 16 --max-pages 1 --lengths 200", "max_pages=1"),
    ("eval ptb --model MODEL --cache dynamic --data-dir DIR --chunk 4", "chunk=4 does nothing in mode exact"),
    ("eval ptb --model MODEL --codebook CB --data-dir DIR --chunk 4", "mode stream"),
    ("eval ptb --model MODEL --cache dynamic --data-dir DIR --mode stream", "says nothing about"),
    ("compare --model MODEL --caches dynamic,pq:4 -M 8", "bits after the colon"),
    ("compare --model MODEL --caches dynamic,static --page-size 16", "--page-size does nothing"),
    ("run --model MODEL --half --dtype bfloat16 --dataset ptb_text_only --data-dir DIR", "--half is float16"),
    ("run --model MODEL --dataset ptb_text_only --data-dir DIR --window 200 --max-pages 1 --page-size 16", "max_pages=1"),
    ("run --model MODEL --dataset ptb_text_only --data-dir DIR -p baseline tuning", "unknown stages"),
    ("calibrate --model MODEL --max-pages 3", "o such option"),
    ("tune --model MODEL --max-loss 0.1 -M 8", "o such option"),
    # Options that nothing would heed.
    ("eval memory --model MODEL --cache dynamic --lengths 64 --data-dir DIR", "--data-dir does nothing"),
    ("eval speed --model MODEL --cache dynamic --lengths 64 --data-dir DIR", "--data-dir does nothing"),
    ("eval breakdown --model MODEL --cache dynamic --data-dir DIR", "--data-dir does nothing"),
    ("eval recall --model MODEL --cache dynamic --lengths 64 --data-dir DIR", "--data-dir does nothing"),
    ("eval ruler --model MODEL --cache dynamic --lengths 200 --tasks vt --data-dir DIR", "--data-dir does nothing"),
    ("eval memory --model MODEL --codebook CB --lengths 64 --data-dir DIR", "--data-dir does nothing"),
    ("calibrate --model MODEL --data-dir DIR", "--data-dir does nothing"),
    ("calibrate --model MODEL --calibration LONG --data-dir DIR", "--data-dir does nothing"),
    ("compare --model MODEL --caches dynamic --tokens 64 --data-dir DIR", "--data-dir does nothing"),
    ("compare --model MODEL --caches dynamic --tokens 64 --text LONG --data-dir DIR", "--data-dir does nothing"),
    ("generate --model MODEL --cache dynamic --prompt Owls --data-dir DIR", "--data-dir does nothing"),
    ("tune --model MODEL --max-loss 0.1 --data-dir DIR", "--data-dir does nothing"),
    ("sweep --model MODEL --tasks demo,recall --data-dir DIR", "--data-dir does nothing"),
    ("sweep --model MODEL --tasks ruler/vt --data-dir DIR", "--data-dir does nothing"),
    ("sweep --model MODEL --tasks demo --recall-count 3", "--recall-count does nothing"),
    ("sweep --model MODEL --tasks recall --window 64", "--window does nothing"),
    ("tune --model MODEL --max-loss 0.1 --recall-count 0 --max-recall-loss 0.2", "--max-recall-loss does nothing"),
    ("generate --model MODEL --cache dynamic --prompt Owls --no-exact", "--no-exact does nothing"),
    ("generate --model MODEL --cache dynamic --prompt Owls --top-p 0.5", "--top-p does nothing"),
    ("generate --model MODEL --cache dynamic --prompt Owls --results rows.jsonl", "generate has none"),
    ("eval memory --model MODEL --cache dynamic --lengths 64 --force", "--force measures again"),
    ("eval memory --model MODEL --cache dynamic --lengths 64 --revision main", "--revision is of a Hub repository"),
    ("plan MODEL --tokens 64 --revision main", "--revision is of a Hub repository"),
    ("eval memory --model MODEL --cache dynamic --device cpu --device-map auto", "give one of the two"),
    ("run --model MODEL --dataset ptb_text_only --data-dir DIR --no-paged", "--no-paged"),
    ("publish CB --repo a/b --license mit --dry-run out --private", "--private does nothing"),
    ("publish CB --repo a/b --license mit --dry-run out --revision main", "--revision does nothing"),
    ("publish CB --repo a/b --license mit --dry-run out --create-pr", "--create-pr does nothing"),
    ("compare --model MODEL --caches dynamic --tokens 64 --measure memory --limit 2", "--limit does nothing"),
    ("compare --model MODEL --caches dynamic --tokens 64 --measure perplexity --recall-count 2", "--recall-count does nothing"),
    ("compare --model MODEL --caches dynamic --tokens 64 --measure recall --new-tokens 4", "--new-tokens does nothing"),
    ("eval longbench --model MODEL --cache dynamic --limit 1.5", "a share of them between 0 and 1"),
    ("eval ruler --model MODEL --cache dynamic --lengths 200 --tasks qa_1 --data-dir DIR", "holds no squad.json"),
    # Lengths, depths and windows that mean nothing.
    ("eval recall --model MODEL --cache dynamic --lengths 8", "take"),
    ("eval recall --model MODEL --cache dynamic --lengths 64 --depths 7", "from 0 to 1"),
    ("eval recall --model MODEL --cache dynamic --lengths 64 --depths=-3", "from 0 to 1"),
    ("eval recall --model MODEL --cache dynamic --lengths 64 --depths ,", "from 0 to 1"),
    ("eval recall --model MODEL --cache dynamic --lengths 256", "positions for 256"),
    ("eval recall --model MODEL --cache dynamic --lengths 64 --text SHORT", "the text to hide keys in"),
    ("eval speed --model MODEL --cache dynamic --lengths ,", "lengths"),
    ("eval speed --model MODEL --cache dynamic --lengths 64,,128", "lengths"),
    ("eval speed --model MODEL --cache dynamic --lengths 0", "at least 1 token"),
    ("eval speed --model MODEL --cache dynamic --lengths 64 --new-tokens 200", "positions for 256"),
    ("eval memory --model GPT2 --cache dynamic --lengths 64,300", "positions for 256"),
    ("eval breakdown --model MODEL --cache dynamic --tokens 250", "positions for 256"),
    ("eval ptb --model GPT2 --cache dynamic --data-dir DIR --window 300", "positions for 256"),
    ("eval ptb --model MODEL --cache dynamic --data-dir DIR --window 300", "positions for 256"),
    ("eval ptb --model MODEL --cache dynamic --data-dir DIR --window 64 --stride 65", "stride"),
    ("eval harness --model MODEL --cache dynamic --tasks ,", "names separated by commas"),
    ("eval longbench --model MODEL --cache dynamic --tasks ,", "names separated by commas"),
    ("eval longbench --model MODEL --cache dynamic --tasks qasper --data-dir DIR", "holds no qasper.jsonl"),
    ("compare --model GPT2 --caches dynamic --tokens 256", "positions for 256"),
    ("compare --model MODEL --caches , --tokens 64", "names separated by commas"),
    ("compare --model MODEL --caches dynamic --tokens 128 --text SHORT", "the text has"),
    ("tune --model MODEL --max-loss 0.1 --window 300", "positions for 256"),
    ("tune --model MODEL --max-loss 0.1 --tokens 300", "positions for 256"),
    ("tune --model MODEL --max-loss 0.1 --try-bits ,", "whole numbers"),
    ("run --model GPT2 --dataset ptb_text_only --data-dir DIR --window 300", "positions for 256"),
    ("demo --model GPT2 --tokens 256", "positions for 256"),
    # What can be known before slow work.
    ("run --model MODEL --dataset ptb_text_only --data-dir DIR --calibration nowhere.txt", "nowhere.txt"),
    ("run --model MODEL --dataset ptb_text_only --data-dir DIR -o SHORT/out", "is a file"),
    ("eval memory --model MODEL --cache pq --calibration nowhere.txt", "nowhere.txt"),
    ("eval memory --model MODEL --cache pq --calibration LATIN", "latin.txt"),
    ("eval memory --model MODEL --cache pq --calibration SHORT", "4 sinks and a page of 64 take 68"),
    ("run --model MODEL --dataset ptb_text_only --data-dir DIR --calibration SHORT", "4 sinks and a page of 64 take 68"),
    ("calibrate --model MODEL -M 7", "num_subspaces=7 does not cut keys of 16"),
    ("calibrate --model MODEL --text nowhere.txt", "nowhere.txt"),
    ("eval memory --model MODEL --cache pq -M 7", "num_subspaces=7 does not cut keys of 16"),
    ("eval memory --model MODEL --cache pq --value-subspaces 7", "value_subspaces=7 does not cut values of 16"),
    ("eval memory --model MODEL --cache dynamic --json SHORT/rows.json", "is a file"),
    ("eval memory --model MODEL --cache dynamic --results SHORT/rows.jsonl", "is a file"),
    ("eval memory --model MODEL --cache dynamic --results SHORT", "no result row"),
    ("eval memory --model MODEL --cache dynamic --device cuda:7", "cuda:7"),
    ("compare --model MODEL --caches dynamic --markdown SHORT/table.md", "is a file"),
    ("calibrate --model MODEL -o SHORT/cb", "is a file"),
    ("tune --model MODEL --max-loss 0.1 -o SHORT/best.yaml", "is a file"),
    ("tune --model MODEL --max-loss 0.1 --text nowhere.txt", "nowhere.txt"),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_is_refused_in_one_line_before_weights_are_loaded(
    line: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "MODEL": "llama",
        "GPT2": "gpt2",
        "DIR": ".",
        "CB": "cb",
        "OLD": "old",
        "LONG": "long.txt",
        "LATIN": "latin.txt",
        "SHORT": "short.txt",
    }
    words = line.split()
    for name, place in places.items():
        words = [str(folder / place) + word.removeprefix(name) if word.split("/")[0] == name else word for word in words]
    before = (folder / "short.txt").read_bytes()
    result = pqcache(*words)
    assert result.exit_code in (1, 2), result.output
    (told,) = result.output.strip().splitlines()
    assert message in told
    assert (folder / "short.txt").read_bytes() == before
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_defaults_are_what_the_model_can_hold(folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    common = ("--model", folder / "gpt2", "--cache", "dynamic", "--device", "cpu", "--results", results, "--quiet")
    done("eval", "speed", *common, "--repeats", 1)
    done("eval", "memory", *common)
    done("eval", "recall", *common, "--depths", 0.5, "--count", 1)
    done("eval", "breakdown", *common, "--steps", 2)
    done("eval", "ptb", *common, "--data-dir", folder, "--limit", 1)
    found = {(row.task, row.settings.get("tokens", row.settings.get("window"))) for row in Results(results).rows}
    assert found == {("speed", 192), ("memory", 256), ("recall", 248), ("breakdown", 251), ("ptb_text_only", 256)}
    done("calibrate", "--model", folder / "gpt2", "--nbits", 4, "--calibration-tokens", 300, "-o", tmp_path / "cb", "--quiet")
    assert json.loads((tmp_path / "cb" / "codebook.json").read_text())["metadata"]["window"] == 256
    done("compare", "--model", folder / "gpt2", "--caches", "dynamic", "--limit", 1, "--recall-count", 0, "--quiet")


def test_calibrate_says_whether_the_codebook_is_of_use(folder: Path, tmp_path: Path) -> None:
    line = ("calibrate", "--model", folder / "llama", "--device", "cpu", "-o", tmp_path / "cb", "--calibration-tokens", 500)
    line += ("--extended-residual", 32, "--limit", 1, "--json", tmp_path / "facts.json", "--results", tmp_path / "rows.jsonl")
    told = done(*line).output
    facts = json.loads((tmp_path / "facts.json").read_text())
    exact, shipped, own = (row for row in Results(tmp_path / "rows.jsonl").rows)
    assert (exact.cache, shipped.codebook, own.codebook) == ("dynamic", None, facts["fingerprint"])
    assert facts["held_out"] == "demo/test"
    assert facts["held_out_loss_shipped"] == pytest.approx(shipped.value / exact.value - 1, abs=1e-6)
    assert facts["held_out_loss"] == pytest.approx(own.value / exact.value - 1, abs=1e-6)
    assert facts["wins"] == (own.value < shipped.value)
    assert "with the codebook that every model gets" in told
    assert ("its own wins" if facts["wins"] else "its own does not win") in told
    assert json.loads((tmp_path / "cb" / "codebook.json").read_text())["metadata"]["held_out"] == "demo/test"
    other = done(*line, "--text", folder / "long.txt", "--calibration", "ptb_text_only", "--data-dir", folder).output
    assert "long.txt, windows of 256 tokens" in other
    split = done(*line, "--calibration", "ptb_text_only", "--data-dir", folder).output
    assert "ptb_text_only/test, windows of 256 tokens" in split


def test_nothing_is_calibrated_unless_it_is_asked_for(folder: Path) -> None:
    line = ("eval", "ptb", "--model", folder / "llama", "--data-dir", folder, "--window", 64, "--limit", 1, "--device", "cpu")
    for cache in ("pq", "pq:2"):
        assert "calibrating" not in done(*line, "--cache", cache).output
    assert "calibrating on long.txt" in done(*line, "--cache", "pq:2", "--calibration", folder / "long.txt").output


def test_the_calibration_text_is_told_and_whether_it_is_long_enough(folder: Path, tmp_path: Path) -> None:
    line = ("calibrate", "--model", folder / "llama", "--nbits", 4, "--device", "cpu", "-o", tmp_path / "cb")
    short = done(*line, "--calibration", folder / "long.txt").output
    assert "calibrating on long.txt" in short
    assert "65,536 tokens were asked for" in short
    enough = done(*line, "--calibration", folder / "long.txt", "--calibration-tokens", 500).output
    assert "calibrating on long.txt, 500 of its" in enough
    assert "too short" not in enough
    assert "the embedded articles" in done(*line, "--calibration-tokens", 300).output
    made = json.loads((tmp_path / "cb" / "codebook.json").read_text())["metadata"]
    assert (made["source"], made["asked_tokens"], made["tokens"]) == ("demo", 300, 300)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        elif command is not None:
            yield (*path, name), command


def test_no_command_takes_an_option_that_its_code_does_not_look_at() -> None:
    """Every argument of a command's function is read in it, or handed on with all others."""
    folder = Path(importlib.import_module("hf_pqcache.cli.commands").__file__ or "").parent
    seen = 0
    for path in sorted(folder.glob("[a-z]*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or not function.decorator_list:
                continue
            given = [*function.args.args, *function.args.kwonlyargs]
            read = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
            # `quiet` does its work while the command line is parsed; `get` and `setup` come from us.
            unread = {argument.arg for argument in given} - read - {"quiet", "get", "setup", "ctx", "param"}
            assert not unread, f"{path.name}: {function.name} takes {sorted(unread)} and does nothing with it"
            seen += 1
    assert seen > 20


def test_no_option_has_a_default_that_hides_whether_it_was_given() -> None:
    """Settings that only some caches or modes heed are None until somebody asks for them: else none could be refused."""
    hidden = {
        "bits",
        "num_subspaces",
        "num_bits",
        "value_subspaces",
        "value_bits",
        "page_size",
        "max_pages",
        "extended_residual",
        "sink_tokens",
        "seed",
    }
    hidden |= {"calibration", "calibration_tokens", "codebook", "mode", "stride", "window", "lengths"}
    for path, command in commands(main):  # type: ignore[arg-type]
        for option in command.params:
            if path[-1] not in ("plan", "selftest") and option.name in hidden:
                assert option.default is None or not option.to_info_dict().get("default"), (path, option.name)
