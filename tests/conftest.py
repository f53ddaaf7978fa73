"""Which tests run by default, a stand-in for the Hugging Face Hub on the loopback address, and what makes tests quick.

The stand-in knows the Hub's HTTP interface and none of our files. Repositories live in memory. Failures are ordered in
advance: `hub.fail("GET /user/repo/resolve", 503, times=2)`.
"""

from __future__ import annotations

import base64
import functools
import gc
import hashlib
import importlib
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
#: Long tests of what rests on torch and our own bookkeeping, hardly on the release of transformers.
NOT_REPEATED = {"test_own_compile", "test_memory", "test_endurance"}
TOKEN = "hf_ThisTokenMustNeverBeSeenAnywhere"
#: The status of a download that is cut off in the middle.
CUT_OFF = -1


@dataclass
class Repository:
    """Commits of a repository (files by name), its branches and whether a token is needed to see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": ""})
    is_private: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # announced instead of the true ones

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files on top of a branch -> the new commit."""
        merged = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        seed = repr([branch, self.branches.get(branch), sorted((n, hashlib.sha256(b).hexdigest()) for n, b in merged.items())])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = merged, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits or sha == "" else None


class FakeHub:
    """The server: its repositories, the requests it has seen ("METHOD /path") and the failures still to come."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.failures: list[list[Any]] = []
        self.large_files: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        """A new repository with one commit."""
        self.repositories[name] = Repository()
        self.repositories[name].commit(files)
        return self.repositories[name]

    def fail(self, request: str, status: int, times: int = 1) -> None:
        """Answer the next `times` requests that begin with `request` with this status (CUT_OFF: half a file)."""
        self.failures.append([request, status, times])

    def planned_failure(self, request: str) -> int | None:
        for failure in self.failures:
            if request.startswith(failure[0]) and failure[2] > 0:
                failure[2] -= 1
                return int(failure[1])
        return None

    def count(self, request: str) -> int:
        return sum(seen.startswith(request) for seen in self.requests)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Request-Id": "r1", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "", message: str = "refused") -> None:
        self.answer(status, {"error": message}, **{"X-Error-Code": code, "X-Error-Message": message})

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        authorization = self.headers.get("Authorization")
        self.hub.tokens.add(authorization)
        failure = self.hub.planned_failure(f"{self.command} {path}")
        if failure is not None and failure != CUT_OFF:
            self.refuse(failure, message=f"planned failure {failure}")
            return
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[0] == "large":
            self.hub.large_files[parts[1]] = body
            self.answer(200)
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.with_repository("/".join(parts[2:4]), lambda repo: self.api(repo, "/".join(parts[2:4]), parts[4:], body))
        elif len(parts) >= 5 and parts[2] == "resolve":
            name = "/".join(parts[:2])
            self.with_repository(name, lambda repo: self.file(repo, parts[3], "/".join(parts[4:]), failure == CUT_OFF))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        else:
            self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def with_repository(self, name: str, then: Any) -> None:
        repo = self.hub.repositories.get(name)
        if repo is None or (repo.is_private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        else:
            then(repo)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if name in self.hub.repositories:
            self.answer(409, {"url": f"{self.hub.url}/{name}"})
            return
        self.hub.repositories[name] = Repository(
            is_private=bool(wanted.get("private")) or wanted.get("visibility") == "private"
        )
        self.hub.repositories[name].commit({".gitattributes": b""})
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def api(self, repo: Repository, name: str, rest: list[str], body: bytes) -> None:
        action, revision = (rest + ["revision", "main"][len(rest) :])[:2] if rest else ("revision", "main")
        if action == "branch":
            repo.branches.setdefault(revision, repo.branches["main"])
            self.answer(200, {})
            return
        sha = repo.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", "Revision not found")
        elif action == "revision":
            files = repo.commits[sha]
            siblings = [{"rfilename": n, "size": repo.sizes.get(n, len(b)), "blobId": "b"} for n, b in files.items()]
            self.answer(
                200, {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repo.is_private, "siblings": siblings}
            )
        elif action == "preupload":
            wanted = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in wanted
            ]
            self.answer(200, {"files": [{**f, "oid": None} for f in files]})
        elif action == "commit":
            new: dict[str, bytes] = {}
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    new[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    new[value["path"]] = self.hub.large_files[value["oid"]]
            oid = repo.commit(new, revision)
            self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})
        else:
            self.refuse(404)

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}", "header": {}}},
            }
            for o in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def file(self, repo: Repository, revision: str, name: str, is_cut_off: bool) -> None:
        sha = repo.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", "Revision not found")
            return
        if name not in repo.commits[sha]:
            self.answer(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        data = repo.commits[sha][name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if is_cut_off and self.command == "GET":
            self.send_response(206 if start else 200)
            for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.close_connection = True
            return
        self.answer(206 if start else 200, data[start:], **headers)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` look at tests/gpu only: a machine with a GPU need not have what other test files import."""
    is_gpu_only = re.fullmatch(r"gpu( and .*)?", config.option.markexpr.strip())
    is_elsewhere = collection_path.suffix == ".py" and (HERE / "gpu") not in collection_path.parents
    return True if is_gpu_only and is_elsewhere else None


def pytest_configure(config: pytest.Config) -> None:
    """Processes that share the tests (`pytest -n 2`) share the processors, too."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector, which some tests call, need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a process a core, few enough for the memory that torch takes in each."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests, unless they are asked for: with `-m slow`, or by a file's name."""
    if "slow" in config.option.markexpr or any(".py" in str(name) for name in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark as `cache` whatever runs the tiny models of transformers, but for what would take long."""
    names = vars(getattr(item, "module", None) or object)
    if item.path.stem not in NOT_REPEATED and any(
        getattr(thing, "__module__", None) in ("tiny_models", "scenarios", "refusals") for thing in names.values()
    ):
        item.add_marker("cache")


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running stand-in that HF_ENDPOINT points to; waits between tries are skipped."""
    import huggingface_hub.constants
    from huggingface_hub.utils import _runtime

    hub = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_runtime, "is_xet_available", lambda: False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def quick_kmeans() -> Iterator[None]:
    """Two steps of k-means in place of 25, on few samples: for tests to which it is nothing how good a codebook is."""
    module = importlib.import_module("hf_pqcache.codebook.calibrate")

    def few_steps(samples: torch.Tensor, count: int, *, iterations: int, **options: Any) -> Any:
        return kmeans(samples[:, : 2 * count], count, iterations=2, **options)

    with pytest.MonkeyPatch.context() as patch:
        kmeans = module.kmeans
        patch.setattr(module, "kmeans", few_steps)
        yield


@pytest.fixture(scope="session")
def one_task_index() -> Iterator[None]:
    """The harness reads its own thousands of files once for all tests, not for each that asks for its tasks."""
    index = importlib.import_module("lm_eval.tasks.manager").TaskIndex
    own, build = Path(importlib.import_module("lm_eval.tasks").__file__ or "").parent, index.build
    of_own = functools.cache(lambda: build([own]))

    def remembered(paths: Any) -> Any:
        return {name: task for path in paths for name, task in (of_own() if path == own else build([path])).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "build", staticmethod(remembered))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of tiny models, which lose more to waking threads than they gain: up to eight times the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
