"""Whether this machine can serve: packages, what transformers offers, and a request to a tiny server; for `pqcache doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from hf_pqcache import demo
from hf_pqcache.backends.diagnose import Finding

#: Of the extra `serve`.
PACKAGES = ("starlette", "uvicorn", "prometheus_client", "jinja2")
INSTALL = "pip install 'hf-pqcache[serve]'"


def diagnose() -> Iterator[Finding]:
    """In the order in which a server needs them; what cannot be looked at without the one before is left out."""
    found = list(_packages())
    yield from found
    if any(finding.status == "fail" for finding in found):
        return
    parts = _engine()
    yield parts
    yield _ray()
    yield _beside()
    if parts.status == "ok":
        yield _answer()


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fail", "not installed, and serve needs it", INSTALL)


def _engine() -> Finding:
    from hf_pqcache.serve.manager import check

    try:
        check()
    except ImportError as error:
        return Finding("continuous batching", "fail", str(error), "pip install 'transformers>=5.20,<=5.24'")
    return Finding("continuous batching", "ok", "this release of transformers has all parts that we know")


def _ray() -> Finding:
    try:
        return Finding("ray", "ok", f"{importlib.metadata.version('ray')}: --replicas")
    except importlib.metadata.PackageNotFoundError:
        return Finding("ray", "note", "not installed; only serve --replicas needs it", "pip install 'hf-pqcache[ray]'")


def _beside() -> Finding:
    """Where finished prompts can be stored."""
    import torch

    from hf_pqcache.batching import streams

    made = streams.make("partition", None, torch.device("cuda" if torch.cuda.is_available() else "cpu"), is_parallel=False)
    if made.available:
        return Finding("--compress", "ok", f"inline, stream, partition ({made.sm_counts['compress']} multiprocessors)")
    able = "inline, stream" if made.lane.runs_beside else "inline"
    return Finding("--compress", "note", f"{able}: {made.reason}")


def _answer() -> Finding:
    """Serve the embedded model, and ask it."""
    from hf_pqcache.serve.manager import EngineSettings
    from hf_pqcache.serve.server import Running
    from hf_pqcache.serve.service import Limits

    sizes = EngineSettings(cache_tokens=1024, page_size=16, max_requests=2, max_batch_tokens=128)
    try:
        with Running(_tiny, "tiny", sizes, Limits(drain_s=1.0)).background() as url:
            begin = time.perf_counter()
            body = json.dumps({"prompt": "The owl is", "max_tokens": 8, "temperature": 0}).encode()
            with urllib.request.urlopen(f"{url}/v1/completions", body, timeout=60) as answer:
                tokens = json.load(answer)["usage"]["completion_tokens"]
            took = time.perf_counter() - begin
    except Exception as error:
        return Finding("a request", "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "tell us, please")
    return Finding("a request", "ok", f"{tokens} tokens of the embedded model over HTTP in {1000 * took:.0f} ms")


def _tiny() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(demo.MODEL)
    return model.eval(), AutoTokenizer.from_pretrained(demo.MODEL)
