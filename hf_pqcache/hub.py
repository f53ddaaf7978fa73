"""Files to and from the Hugging Face Hub, and a codebook's model card; the only room that imports huggingface_hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download


def download(
    repo_id: str,
    filenames: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch the named files of a model repository and nothing else -> the local folder they lie in.

    Raises what huggingface_hub raises: RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, ...
    """
    folder = snapshot_download(
        repo_id,
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        local_files_only=local_files_only,
        allow_patterns=list(filenames),
    )
    return Path(str(folder))


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
    """Make the model repository if need be and commit all files of `folder` to it -> the commit's address."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
    info = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        repo_type="model",
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    return str(getattr(info, "commit_url", info))


def model_card(repo_id: str, facts: dict[str, Any]) -> str:
    """README.md of a codebook repository: how to load it, and `facts` as a table."""
    base = facts.get("model")
    # Only a Hub id makes sense in a card's front matter; a local folder does not, and would tell of somebody's disk.
    is_hub_id = isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/", "~"))
    front = ["---", "library_name: hf-pqcache", "tags: [kv-cache, product-quantization]"]
    front += [f"base_model: {base}"] if is_hub_id else []
    rows = [f"| {name} | {value} |" for name, value in facts.items() if name != "model" or is_hub_id]
    return "\n".join(
        [
            *front,
            "---",
            "",
            "# Product-quantization codebook for a KV cache",
            "",
            "```python",
            "from hf_pqcache import Codebook, PagedPQCache",
            "",
            f'codebook = Codebook.from_pretrained("{repo_id}")',
            "cache = PagedPQCache(model.config, codebook)",
            "model.generate(**inputs, past_key_values=cache)",
            "```",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )
