"""Files to and from the Hugging Face Hub, and a codebook's model card; the only room that imports huggingface_hub."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from huggingface_hub import EvalResult, HfApi, ModelCardData, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import get_session, validate_repo_id

#: Seconds between two tries of a call that failed in a way that may pass: no connection, too many requests, server error.
RETRY_WAITS_S = (0.5, 1.0, 2.0)
#: What a repository may weigh per file that the caller knows nothing more exact about.
GIBIBYTE = 1 << 30
T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository, in a folder of the local cache."""

    folder: Path
    commit: str


def download(
    repo_id: str,
    max_bytes: Mapping[str, int],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Snapshot:
    """Fetch the named files of a model repository and nothing else, all of one commit.

    Their sizes are asked for first: nothing is downloaded if one is larger than expected. A download is tried again when
    the failure may pass, and reaches the cache only when it is whole. Without a connection the cache is used as it is.

    Args:
        max_bytes: name of each file -> the most bytes it may have.
        revision: branch, tag or commit; None is the newest commit of the main branch.

    Raises:
        ValueError: a file is larger than it may be.
        FileNotFoundError: the repository lacks a file, or there is no connection and the cache lacks it.
        What huggingface_hub raises: RepositoryNotFoundError (also for a private one without a token),
        RevisionNotFoundError, HfHubHTTPError. ConnectionError: a download stopped for want of a connection.
    """
    commit = None
    if not local_files_only:
        try:
            commit = _checked_commit(repo_id, max_bytes, revision, token)
        except ConnectionError:  # only without an answer of the Hub the cache will do
            local_files_only = True

    def fetch(name: str) -> Path:
        path = hf_hub_download(
            repo_id,
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            endpoint=_endpoint(),
        )
        return Path(path)

    folders = set()
    for name, limit in max_bytes.items():
        path = _retried(lambda name=name: fetch(name))  # type: ignore[misc]
        if path.stat().st_size > limit:
            raise ValueError(f"{repo_id}: {name} has {path.stat().st_size:,} bytes, expected at most {limit:,}")
        folders.add(path.parents[len(Path(name).parts) - 1])
    folder = folders.pop()
    if folders or commit not in (None, folder.name):
        raise ValueError(f"{repo_id} changed while it was read; try again, or pin a commit: revision={folder.name!r}")
    return Snapshot(folder, folder.name)


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload PQ codebook",
    create_pr: bool = False,
) -> str:
    """Make the model repository (and the branch `revision`) if need be, commit all files of `folder` -> its address."""
    api = HfApi(endpoint=_endpoint(), token=token)
    _retried(lambda: api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True))
    if revision is not None and not create_pr:
        _retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    info = _retried(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            repo_type="model",
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    )
    return str(getattr(info, "commit_url", info))


def is_reachable() -> bool:
    """Whether the Hub answers, found out in seconds: huggingface_hub itself tries for half a minute."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(_endpoint() or "https://huggingface.co", timeout=10)
    except (HTTPError, OSError):
        return False
    return True


def has_local(repo_id: str, file: str, revision: str | None = None) -> bool:
    """Whether the local cache has a file of a repository."""
    return isinstance(try_to_load_from_cache(repo_id, file, revision=revision), str)


@contextmanager
def offline() -> Iterator[None]:
    """What is read meanwhile comes from the local cache or not at all."""
    with ExitStack() as stack:
        for module in ("huggingface_hub.constants", "datasets.config"):
            if module in sys.modules:
                stack.enter_context(patch.object(sys.modules[module], "HF_HUB_OFFLINE", True))
        yield


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it is user/name in letters that the Hub takes."""
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no repository id: give user/name")


def _is_repo_id(name: str) -> bool:
    try:
        check_repo_id(name)
    except ValueError:
        return False
    return True


def model_card(
    repo_id: str,
    facts: Mapping[str, Any],
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
    body: str = "",
    has_recipe: bool = False,
) -> str:
    """README.md of a codebook repository: metadata for the Hub, how to load it, `facts` as a table, then `body`.

    Args:
        facts: how the codebook was made; "model" among them is the base model.
        license: identifier of the Hub's list; None leaves it open.
        datasets: Hub ids of the texts that it was calibrated on.
        evaluations: arguments of huggingface_hub's EvalResult, which become the card's model-index.
        body: more Markdown: results, plots, conditions.
        has_recipe: the repository holds custom_generate/generate.py.
    """
    base = facts.get("model")
    # Only a Hub id makes sense in a card's front matter; a local folder does not, and would tell of somebody's disk.
    is_hub_id = isinstance(base, str) and _is_repo_id(base)
    results = [EvalResult(**values) for values in evaluations]
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        library_name="hf-pqcache",
        license=license,
        datasets=list(datasets) or None,
        tags=["kv-cache", "product-quantization", *(["custom_generate"] if has_recipe else [])],
        model_name=repo_id.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items() if name != "model" or is_hub_id]
    recipe = [
        "",
        "Or, with the package installed, without a line of it:",
        "",
        "```python",
        f'model.generate(**inputs, custom_generate="{repo_id}", trust_remote_code=True)',
        "```",
    ]
    return "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            "",
            f"# Product-quantization codebook for the KV cache{f' of {base}' if is_hub_id else ''}",
            "",
            "`pip install hf-pqcache`, then:",
            "",
            "```python",
            "from hf_pqcache import PagedPQCache",
            "",
            f'cache = PagedPQCache.from_pretrained("{repo_id}", model)  # revision="..." pins a commit',
            "model.generate(**inputs, cache=cache, max_new_tokens=200)  # before transformers 5.24: past_key_values=cache",
            "```",
            *(recipe if has_recipe else []),
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *([body, ""] if body else []),
        ]
    )


def _checked_commit(repo_id: str, max_bytes: Mapping[str, int], revision: str | None, token: str | bool | None) -> str:
    """The commit that `revision` stands for, after the names and sizes of its files have been checked."""
    api = HfApi(endpoint=_endpoint(), token=token)
    info = _retried(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    for name, limit in max_bytes.items():
        if name not in sizes:
            raise FileNotFoundError(f"{repo_id!r} holds no {name}; it is no codebook repository, or of another version")
        size = sizes[name]
        if size is None or size > limit:
            told = "an unknown number of" if size is None else f"{size:,}"
            raise ValueError(f"{repo_id}: {name} has {told} bytes, expected at most {limit:,}; nothing was downloaded")
    return str(info.sha)


def _retried(call: Callable[[], T]) -> T:
    """What `call` returns, tried again after a while when it fails in a way that may pass.

    Raises ConnectionError if the Hub cannot be reached, and else what `call` raises.
    """
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return call()
        except (HTTPError, OSError) as error:
            if wait_s is not None and _may_pass(error):
                time.sleep(wait_s)
            elif isinstance(error, HfHubHTTPError) or not isinstance(error, HTTPError):
                raise
            else:
                raise ConnectionError(f"the Hub ({_endpoint() or 'huggingface.co'}) cannot be reached: {error}") from error
    raise AssertionError("the last try returns or raises")


def _may_pass(error: BaseException | None) -> bool:
    """Whether it is, or comes from, a broken connection, too many requests or an error of the server."""
    while error is not None:
        if isinstance(error, HTTPError):
            status = getattr(getattr(error, "response", None), "status_code", None)
            return status is None or status == 429 or status >= 500
        error = error.__cause__
    return False


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now; huggingface_hub itself reads it at import only."""
    return os.environ.get("HF_ENDPOINT") or None


def _cell(value: Any) -> str:
    """A value inside a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())
