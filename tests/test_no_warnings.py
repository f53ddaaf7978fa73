"""What users run and copy warns of nothing: the commands on the embedded model, and the README's examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_pqcache import demo
from hf_pqcache.batching import support
from hf_pqcache.models.names import CACHE

pytestmark = pytest.mark.cache
ROOT = Path(__file__).parents[1]
MODEL = "--model tiny --device cpu -M 16 --nbits 4"
KEPT = "--model tiny --device cpu --codebook book --cache pq --results rows.jsonl"
#: In one process, since importing torch and transformers takes longer than any of them.
COMMANDS = f"""
demo --tokens 256 --text short.txt
calibrate {MODEL} --calibration-tokens 512 --limit 1 -o book
eval speed {KEPT} --lengths 64 --new-tokens 3 --repeats 1
eval memory {KEPT} --lengths 64
eval breakdown {KEPT} --tokens 64 --steps 1
eval recall {KEPT} --lengths 256 --depths 0 --count 1
compare {MODEL} --caches dynamic,pq --tokens 256 --limit 1 --recall-count 0 --new-tokens 2 --results rows.jsonl
publish book --repo user/book --license mit --dry-run repository --results rows.jsonl
report rows.jsonl -o report
doctor --no-kernels
"""
#: What a command does in a process of its own, the demo with one operating point.
RUN = """
import shlex, sys, warnings
warnings.simplefilter("error", FutureWarning)
warnings.simplefilter("error", UserWarning)
from hf_pqcache.cli import main
from hf_pqcache.eval import demo
demo.OPERATING_POINTS = (4,)
for line in sys.argv[1].strip().splitlines():
    main(shlex.split(line), standalone_mode=False)
"""
EXAMPLE = """
import functools
import hf_pqcache, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_pqcache import demo
hf_pqcache.calibrate = functools.partial(hf_pqcache.calibrate, num_tokens=512, window=512, iterations=1)
tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
texts = [demo.TEXT.read_text()]
inputs = tokenizer("A page of codes", return_tensors="pt")
model.generation_config.pad_token_id = 0
layer_idx, k, v = 0, *torch.randn(2, 2, 1000, 64)
prompts = inputs["input_ids"].tolist()
"""


def run(*arguments: str, folder: Path) -> str:
    """What the process says on stderr. Fails if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::FutureWarning", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def assert_silent(said: str) -> None:
    assert not re.search(r"deprecat|warning", said, re.IGNORECASE), said[-3000:]


def test_no_command_warns(tmp_path: Path) -> None:
    text = demo.TEXT.read_text().split("<|endoftext|>")
    (tmp_path / "short.txt").write_text("<|endoftext|>".join(part[:1500] for part in text[:3]))
    assert_silent(run("-c", RUN, COMMANDS, folder=tmp_path))
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "model.generate(**inputs, cache=cache, " in card


def test_no_example_of_the_readme_warns(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [example.replace(" cache=cache", f" {CACHE}=cache") for example in examples if "torchrun" not in example]
    assert len(examples) == 3
    if support.why_unsupported():
        examples = [example for example in examples if "enable_batching" not in example]
    assert_silent(run("-c", EXAMPLE + "\n".join(examples), folder=tmp_path))
