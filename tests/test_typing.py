"""A user's script on the public names passes `mypy --strict`: the package is typed, and its names are exported as such."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_pqcache

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[1]
SCRIPT = """
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_pqcache
from hf_pqcache import (
    Codebook, MemoryPlan, PagedKVCache, PagedPQCache, PQCacheError, PQConfig, calibrate, disable_batching, enable_batching,
    plan_memory, pressed,
)


def plan(config: Any) -> int:
    found: MemoryPlan = plan_memory(config, tokens=32768, batch=8, pq_config=PQConfig(bits=3))
    return found["pq:4"].total - found.saved("pq:4")


def load(model: Any, tokenizer: Any, text: str) -> PagedPQCache:
    codebook: Codebook = calibrate(model, tokenizer, text, PQConfig(bits=4))
    codebook.save_pretrained(Path("book"))
    book = Codebook.from_pretrained("book")
    cache = PagedPQCache(model.config, book, PQConfig(bits=4), expected_tokens=4096, page_size="auto")
    again: PagedPQCache = PagedPQCache.from_pretrained("book", model, offload=True)
    return again if cache.get_seq_length() else cache


def many(model: Any, prompts: list[list[int]]) -> Any:
    enable_batching(model, bits=4, max_length=8192, page_size=64)
    answers = model.generate_batch(prompts)
    disable_batching(model)
    with pressed(model, "snapkv:0.5"):
        model.generate(cache=PagedPQCache(model.config))
    return answers


def serve(config: Any, keys: Tensor, values: Tensor) -> dict[str, Any]:
    cache = PagedKVCache(config, page_size=64, max_pages=None, compile=False)
    cache.allocate_sequence("a", initial_len=64)
    cache.append_tokens("a", 0, keys, values)
    cache.fork_sequence("a", "b")
    cache.crop_sequence("b", 10)
    decoded: tuple[Tensor, Tensor] = cache.get_kv("b", 0)
    data: bytes = cache.export_sequence("a")
    cache.import_sequence(data, "c", device=torch.device("cpu"))
    pages: int = cache.sequence_stats("c")["pages"]
    try:
        cache.free_sequence("a")
    except PQCacheError as error:
        print(error.code, pages, decoded[0].shape, cache.sequence_ids, hf_pqcache.__version__)
    return cache.stats()
"""
MISUSE = """
from hf_pqcache import PagedPQCache
PagedPQCache("a name", bits=4, expected_tokens="many")
"""


def check(script: str, folder: Path) -> str:
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports", "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_users_script_passes_strictly(tmp_path: Path) -> None:
    for name in hf_pqcache.__all__:
        assert name in SCRIPT, f"{name} is public: use it in the script"
    assert check(SCRIPT, tmp_path).startswith("Success")
    assert 'has incompatible type "str"; expected "int | None"' in check(MISUSE, tmp_path)
