"""Every command, once right and three times wrong: exit codes, mistakes in one line, 80 columns; and every help's example."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import datasets
import pytest
import torch
from click.testing import CliRunner, Result

from hf_pqcache import Codebook, demo
from hf_pqcache.cli import main
from hf_pqcache.eval.session.results import Results, Row

pytestmark = pytest.mark.usefixtures("one_thread", "quick_kmeans", "one_task_index")
#: Command -> (a right line, {a wrong line: what its one line says}). Lines run in a folder with what `folder` puts there.
SHEET: dict[str, tuple[str, dict[str, str]]] = {
    "bench kernel": (
        "--help",
        {
            "--case 1,8": "batch,kv_heads,group,tokens",
            "--case 1,8,4,many": "batch,kv_heads,group,tokens",
            "--plots x.png": "No such option",
        },
    ),
    "bench generate": (
        "--help",
        {
            "--case llama-3.1-8b": "shape,tokens",
            "--case nobody,128": "unknown shapes",
            "--cache zip": "unknown caches",
        },
    ),
    "bench serve": (
        "--model tiny --variant stock --prompt-tokens 64 --output-tokens 2 --concurrency 2 --no-check --json - --quiet",
        {
            "": "give one of --shape and --model",
            "--model tiny --variant 5": "--variant",
            "--model tiny --concurrency none": "give numbers of requests",
            "--shape nobody": "known ones are",
            "--model tiny --json empty.jsonl": "holds no rows of this benchmark",
        },
    ),
    "bench pipeline": (
        "--models tiny --variants baseline --synthetic-context 64 --synthetic-output 2 --synthetic-batch-sizes 2 --no-check "
        "--json - --quiet",
        {
            "--models nobody": "no model config 'nobody'",
            "--models tiny --variants quad": "known are baseline",
            "--models tiny --workloads chat": "known are synthetic-long",
            "--models tiny --greenctx-compress-ratio 2": "between 0 and 1",
        },
    ),
    "calibrate": (
        "--model tiny --nbits 4 --calibration-tokens 300 -o made --quiet",
        {
            "--model tiny --calibration latin1.txt -o made": "latin1.txt is no UTF-8 text",
            "--model tiny --nbits 9": "--nbits",
            "--model nobody": "no model config 'nobody'",
        },
    ),
    "compare": (
        "--model tiny --caches dynamic,paged-kv --tokens 64 --limit 1 --recall-count 0 --new-tokens 2 --quiet",
        {
            "--model tiny --caches zip": "cache 'zip' is unknown",
            "--model tiny --caches dynamic --text nothing.txt": "nothing.txt",
            "--model tiny --caches dynamic --device tpu": "is no device",
        },
    ),
    "demo": (
        "--help",
        {"--model nobody": "no model config", "--text nothing.txt": "does not exist", "--tokens 10": "--tokens"},
    ),
    "doctor": (
        "--no_kernels --json found.json",
        {"--no-kernel-at-all": "No such option", "extra": "unexpected extra argument", "--json": "requires an argument"},
    ),
    "eval": ("--help", {"nothing": "No such command", "--model tiny": "No such option", "memory": "which model"}),
    "eval breakdown": (
        "--model tiny --cache dynamic --tokens 64 --steps 1 --quiet",
        {
            "--model tiny --steps 0": "--steps",
            "--model tiny --tokens 9999999": "positions",
            "--model cut --cache dynamic": "cut short",
        },
    ),
    "eval harness": (
        "--model tiny --cache dynamic --tasks pqcache_articles --limit 1 --quiet",
        {
            "--model tiny --tasks nothing_of_the_kind": "no task 'nothing_of_the_kind'",
            "--model tiny": "--tasks",
            "--model tiny --tasks pqcache_articles --batch-size 0": "--batch-size",
        },
    ),
    "eval longbench": (
        "--model tiny --cache dynamic --data_dir data --tasks qasper --limit 1 --max-new-tokens 2 --quiet",
        {
            "--model tiny --cache dynamic --data-dir data --tasks lcc": "lcc.jsonl",
            "--model tiny --cache dynamic --tasks nothing": "no task 'longbench/nothing'",
            "--model tiny --data-dir nowhere": "does not exist",
        },
    ),
    "eval ruler": (
        "--model tiny --cache dynamic --tasks vt --lengths 300 --count 1 --quiet",
        {
            "--model tiny --tasks nothing": "no task 'ruler/nothing'",
            "--model tiny --cache dynamic --tasks vt --lengths 20": "use a greater length",
            "--model tiny --lengths 99999999": "positions",
        },
    ),
    "eval longbench-v2": (
        "--model tiny --cache dynamic --data-dir data --limit 0.5 --max-new-tokens 2 --max-length 99 --quiet",
        {
            "--model tiny --cache dynamic --data-dir empty": "longbench-v2.jsonl",
            "--model tiny --limit 1.5": "--limit",
            "--model tiny --data-dir data --chat": "no chat template",
        },
    ),
    "eval infinitebench": (
        "--model tiny --cache dynamic --data-dir data --tasks passkey --limit 1 --max-length 99 --quiet",
        {
            "--model tiny --data-dir data --tasks math_find": "math_find.jsonl",
            "--model tiny --tasks nothing": "no task 'infinitebench/nothing'",
            "--model tiny --limit none": "--limit",
        },
    ),
    "eval memory": (
        "--model tiny --cache pq --codebook cb --lengths 64,128 --json - --quiet",
        {
            "--model tiny --lengths 0": "at least 1 token",
            "--model tiny --device cuda": "sees no CUDA device",
            "--model tiny --cache dynamic --json latin1.txt/x.json --lengths 64": "latin1.txt",
        },
    ),
    "eval ptb": (
        "--model tiny --cache dynamic --data-dir data --window 64 --limit 1 --quiet",
        {
            "--model tiny --cache dynamic --data-dir empty": "holds no ptb.test.txt",
            "--model tiny --window 1": "--window",
            "--model tiny --mode fast": "--mode",
        },
    ),
    "eval recall": (
        "--model tiny --cache dynamic --lengths 96 --depths 0.5 --count 1 --results rows.jsonl --quiet",
        {
            "--model tiny --depths 0,7": "--depths",
            "--model tiny --lengths ,": "--lengths",
            "--model tiny --cache dynamic --text latin1.txt": "latin1.txt is no UTF-8 text",
        },
    ),
    "eval speed": (
        "--model tiny --cache dynamic --lengths 32 --new_tokens 2 --repeats 1 --quiet",
        {
            "--cache dynamic": "which model",
            "--model tiny --cache hqq:7": "use one of",
            "--model tiny --cache dynamic --results broken.jsonl": "broken.jsonl, line 1",
        },
    ),
    "eval wikitext": (
        "--model tiny --cache dynamic --data-dir data --window 64 --limit 1 --quiet",
        {
            "--model tiny --cache dynamic --data-dir data --split validation": "wiki.valid.raw",
            "--model broken.yaml": "broken.yaml",
            "--model tiny --codebook nowhere --cache pq": "nowhere",
        },
    ),
    "generate": (
        "--model tiny --cache pq --codebook cb --prompt Owls --max-new-tokens 2 --quiet",
        {
            "--model tiny": "one of --prompt TEXT, --file FILE and --chat",
            "--model tiny --file latin1.txt": "latin1.txt is no UTF-8 text",
            "--model tiny --prompt Owls --template --cache dynamic": "no chat template",
        },
    ),
    "list": (
        "caches presses configs tasks",
        {"everything": "'everything' is not one of", "--nope": "No such option", "caches --json": "requires an argument"},
    ),
    "lm-eval": (
        "--help",
        {
            "--model hf-pqcache --model_args pretrained=tiny,cache=zip --tasks pqcache_articles": "cache 'zip' is unknown",
            "--model hf-pqcache --model_args pretrained=nobody --tasks pqcache_articles": "no model config 'nobody'",
            "--model hf-pqcache --model_args pretrained=tiny,cache=dynamic --tasks nothing_of_the_kind": "nothing_of_the_kind",
        },
    ),
    "plan": (
        "llama.json --tokens 128K --batch 4",
        {"nobody": "no model config 'nobody'", "llama.json --tokens 0": "at least 1 token", "": "Missing argument 'MODEL'"},
    ),
    "publish": (
        "cb --repo me/tiny --license mit --dry-run preview",
        {
            "cb --repo tiny --license mit --dry-run p": "user/name",
            "empty --repo me/tiny --license mit --dry-run p": "codebook.json",
            "cb --license mit": "--repo",
        },
    ),
    "report": (
        "old.jsonl -o page",
        {"nothing.jsonl": "does not exist", "broken.jsonl": "broken.jsonl, line 1", "empty.jsonl": "no row"},
    ),
    "run": (
        "-f tiny --data-dir data --calibration demo -M 8 --nbits 4 --calibration-tokens 300 --window 64 --limit 1 -o r --quiet",
        {
            "-f tiny --data-dir data -p basline": "basline",
            "-f tiny --data-dir data --dataset nothing": "nothing",
            "-f small": "--model",
        },
    ),
    "scale": (
        "--quiet",
        {
            "nobody": "no model config 'nobody'",
            "--tokens many": "give lengths like",
            "--tokens 1K --shared 4K": "cannot be shared",
        },
    ),
    "selftest": ("--help", {"--phase 7": "--phase", "--phase 1 --compare": "--phase", "--quickly": "No such option"}),
    "serve": (
        "--help",
        {
            "nobody": "no model config 'nobody'",
            "tiny --port 99999": "--port",
            "cut --port 0": "cut short",
            "tiny --host 192.0.2.1": "192.0.2.1:8000 cannot be listened on",
            "tiny --device cuda": "sees no CUDA device",
            "tiny --tp 2 --press knorm:0.5": "--press sees the heads of one process only",
            "tiny --tp 2 --device-map auto": "leave out --device and --device-map",
            "tiny --press nothing:0.5": "press 'nothing' is unknown",
            "tiny --bits stock --press knorm:0.5": "press= is for blocks of ours",
            "tiny --greenctx-main-ratio 0.5": "does nothing without --compress partition",
            "tiny --compress partition --greenctx-main-ratio 2": "lies between 0 and 1",
        },
    ),
    "sweep": (
        "--model tiny -M 8 --nbits 4 --tokens 256 --limit 1 --recall-count 1 --quiet",
        {
            "--model tiny -M 7": "--num-subspaces",
            "--model tiny -M 48": "num_subspaces=48",
            "--model tiny --tasks nothing": "'nothing' is no file",
        },
    ),
    "train-compressor": (
        "--help",
        {
            "--text latin1.txt --model tiny": "latin1.txt is no UTF-8 text",
            "--model tiny --prompt 60": "no group of 4",
            "--text demo": "which model?",
        },
    ),
    "tune": (
        "--help",
        {
            "-f tiny": "budget",
            "-f tiny --max-ratio 0.3 --try-bits 3": "--try-bits",
            "-f tiny --max-loss 0.01 --text latin1.txt": "latin1.txt is no UTF-8 text",
        },
    ),
}
#: Examples that need what a test machine has not: a GPU. They refuse in one line where there is none.
NEEDS_GPU = ("bench", "bench kernel", "bench generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets as plain files, a codebook, a config alone, and everything that is broken in its own way."""
    folder = tmp_path_factory.mktemp("here")
    lines = demo.TEXT.read_text(encoding="utf-8").splitlines()
    (folder / "data").mkdir()
    for name, part in (("train", lines[:100]), ("test", lines[100:300])):
        (folder / "data" / f"wiki.{name}.raw").write_text("".join(f" {line} \n" for line in part), encoding="utf-8")
        (folder / "data" / f"ptb.{name}.txt").write_text(" ".join(part).lower().replace(". ", " \n "), encoding="utf-8")
    examples = [{"input": "What?", "context": lines[20 + i], "answers": ["an owl"], "length": 99} for i in range(3)]
    (folder / "data" / "qasper.jsonl").write_text("".join(json.dumps(x) + "\n" for x in examples))
    choice = {f"choice_{letter}": letter.lower() for letter in "ABCD"}
    question = {**choice, "context": lines[20], "question": "?", "answer": "B", "difficulty": "easy", "length": "short"}
    (folder / "data" / "longbench-v2.jsonl").write_text(2 * (json.dumps(question) + "\n"))
    needle = {"id": 0, "context": lines[20], "input": "The pass key?", "answer": ["12345"], "options": []}
    (folder / "data" / "passkey.jsonl").write_text(json.dumps(needle) + "\n")
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "broken.yaml").write_text("model: [")
    (folder / "latin1.txt").write_bytes("à la carte".encode("latin-1"))
    llama = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "llama.json").write_text(json.dumps({**llama, "num_hidden_layers": 2, "vocab_size": 99}))
    (folder / "cut").mkdir()
    for path in Path(demo.MODEL).iterdir():
        data = path.read_bytes()
        (folder / "cut" / path.name).write_bytes(data[:-999] if path.suffix == ".safetensors" else data)
    draw = torch.Generator().manual_seed(0)
    book = Codebook(*(torch.randn(1, 16, 8, generator=draw).half() for _ in range(2)), metadata={"model": "tiny"})
    for name in ("cb", "codebook"):  # the second is where examples look for one
        book.save_pretrained(folder / name)
    for name, cache, value in [(n, *x) for n in ("old", "rows") for x in (("dynamic", 20.0), ("pq", 20.5))]:
        Results(folder / f"{name}.jsonl").add(
            Row("wikitext", "perplexity", value, model="tiny", cache=cache, true_bits=4.0, settings={"window": 64})
        )
    return folder


@pytest.fixture
def here(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("COLUMNS", raising=False)
    return folder


def run(line: str) -> Result:
    return CliRunner().invoke(main, shlex.split(line))


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command and group but the top."""
    top = click.Context(main, info_name="pqcache")
    for name in main.list_commands(top):
        command = main.get_command(top, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            for sub in command.list_commands(top):
                found = command.get_command(top, sub)
                assert found is not None
                yield f"{name} {sub}", found


COMMANDS = dict(commands())


def test_the_sheet_has_every_command() -> None:
    assert set(SHEET) | {"bench"} == set(COMMANDS)
    assert all(len(wrong) >= 3 for _, wrong in SHEET.values())


@pytest.mark.parametrize("name", SHEET)
def test_right(name: str, here: Path) -> None:
    done = run(f"{name} {SHEET[name][0]}")
    assert done.exit_code == 0, done.output
    assert "--quiet" not in SHEET[name][0] or "--json -" in SHEET[name][0] or not done.stderr, "quiet is quiet"
    said = done.stderr if "--json -" in SHEET[name][0] else done.output
    long = [line for line in said.splitlines() if len(line) > 80]
    assert name == "lm-eval" or not long, long  # its help is the harness's own


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, (_, lines) in SHEET.items() for wrong in lines])
def test_wrong(name: str, wrong: str, here: Path) -> None:
    before = sorted(here.rglob("*"))
    done = run(f"{name} {wrong}")
    assert done.exit_code in (1, 2), done.output
    told = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1, done.output
    assert SHEET[name][1][wrong] in told[0]
    assert "Traceback" not in done.output
    assert "not foreseen" not in done.output
    assert sorted(here.rglob("*")) == before  # nothing half-made is left


def example(command: click.Command) -> str:
    """The line that the help gives, its continuations joined."""
    text = (command.help or "").replace("\b", "")
    assert "Example:" in text, f"{command.name} gives no example"
    return " ".join(text.split("Example:")[1].split("\n\n")[0].replace("\\\n", " ").split())


def end_when_ready(url: str) -> None:
    """Send SIGTERM to this process once a server in it is ready."""
    for _ in range(600):
        time.sleep(0.1)
        with suppress(OSError), urllib.request.urlopen(url):  # a status that is no 200 is an OSError, too
            os.kill(os.getpid(), signal.SIGTERM)
            return


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_the_help_runs_as_printed(name: str, here: Path) -> None:
    line = example(COMMANDS[name])
    assert line.startswith("pqcache "), line
    if name == "serve":
        threading.Thread(target=end_when_ready, args=["http://127.0.0.1:8765/health"], daemon=True).start()
    done = run(line.removeprefix("pqcache "))
    if name in NEEDS_GPU and not torch.cuda.is_available():
        assert done.exit_code == 1
        assert done.output.startswith("Error: ")
        assert "GPU" in done.output
        return
    assert done.exit_code == 0, done.output


def test_help_is_whole_and_narrow() -> None:
    for name in ("", *COMMANDS):
        text = run(f"{name} --help").output
        commands = text.partition("Commands:\n")[2]  # click cuts the lines here, unless told not to
        assert not any(line.endswith("...") for line in commands.splitlines()), name
        if name != "lm-eval":
            assert max(map(len, text.splitlines())) <= 80, name


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, time\n"
        "from click.testing import CliRunner\nfrom hf_pqcache.cli import main\n"
        "for line in ['--help', 'eval --help', 'eval longbench --help', 'run --help', 'plan --help', '--version']:\n"
        "    done = CliRunner().invoke(main, line.split())\n    assert done.exit_code == 0, done.output\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'lm_eval', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5  # seconds of work: others may keep the processor from it


def test_serve_names_the_extra_that_it_needs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("uvicorn", "hf_pqcache.serve."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = run("serve tiny")
    assert (done.exit_code, done.output) == (1, "Error: uvicorn is not installed; type: pip install 'hf-pqcache[serve]'\n")


def test_json_alone_is_on_the_output(here: Path) -> None:
    done = run("eval memory --model tiny --cache dynamic --lengths 64 --json - --quiet")
    assert {row["metric"] for row in json.loads(done.stdout)["rows"]} >= {"kv_bytes", "codebook_bytes"}
    assert "kv_bytes" in done.stderr


def test_quiet_is_quiet(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in (
        "eval harness --model tiny --cache dynamic --tasks pqcache_articles --limit 1 --quiet",
        "eval memory --model tiny --cache dynamic --lengths 64 --quiet",
    ):
        assert run(line).stderr == ""
    assert capfd.readouterr().err == ""  # of other programs, too


def test_ctrl_c_ends_with_130(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_pqcache.eval.tasks.memory.measure_memory", interrupt)
    done = run("eval memory --model tiny --cache dynamic --lengths 64 --quiet")
    assert done.exit_code == 130
    assert "Traceback" not in done.output


def test_what_nobody_foresaw_is_a_line_too_and_a_traceback_on_request(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_pqcache.eval.tasks.memory.measure_memory", lambda *args, **kwargs: 1 / 0)
    line = "eval memory --model tiny --cache dynamic --lengths 64 --quiet"
    done = run(line)
    assert done.exit_code == 1
    assert "ZeroDivisionError" in done.output
    assert "--debug" in done.output
    assert isinstance(run(f"--debug {line}").exception, ZeroDivisionError)


def test_run_tells_change_and_savings(here: Path) -> None:
    done = run(f"run {SHEET['run'][0]}")
    assert "saved" in done.output
    (changes,) = [line for line in done.output.splitlines() if "change" in line and "metric" in line]
    assert changes
    assert sum("%" in line and "perplexity" in line for line in done.output.splitlines()) == 2  # stream and distort


def test_replacing_a_file_is_told(here: Path) -> None:
    line = "list caches --json names.json"
    assert "over the one" not in run(line).output
    assert "over the one" in run(line).output


def test_a_full_disk_is_a_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device", str(self))

    for write in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, write, full)
    done = run("list caches --json full.json")
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "Error: full.json: no space left on the device"


def test_what_lies_here_comes_before_what_came_along(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called tiny, a file called demo, and paths in a YAML file seen from its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "tiny").mkdir()
    config = json.loads((Path(demo.MODEL) / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    done = run("plan tiny --tokens 64 --no-weights")
    assert "7 layers" in done.output
    assert "Warning: 'tiny' is a model's folder here and a built-in name" in done.output
    (tmp_path / "sub" / "mine.yaml").write_text("model: ../tiny\n")
    assert "7 layers" in run("plan sub/mine.yaml --tokens 64 --no-weights").output
    (tmp_path / "sub" / "other.yaml").write_text("model: tiny\n")  # no folder beside it: a name like any other
    assert run("plan sub/other.yaml --tokens 64 --no-weights").exit_code in (0, 1)


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_pqcache.codebook.hub.is_reachable", lambda: False)
    done = run("plan nobody/nothing-of-the-kind --tokens 64")
    assert done.exit_code == 1
    assert "nobody/nothing-of-the-kind" in done.output
    assert "cannot be reached" in done.output
    done = run("eval wikitext --model tiny --cache dynamic --quiet")
    assert "Salesforce/wikitext" in done.output
    assert "--data-dir" in done.output
