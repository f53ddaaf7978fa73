"""Fingerprint of a model: its config and weights, however its folder is called; loads no model, knows no cache.

Three kinds, told apart by their first word. `files`: of a local folder, independent of the dtype that it is loaded in.
`commit`: of a Hub repository. `weights`: of a model that is in memory. Fingerprints of different kinds say nothing
about each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The first of these of which a folder holds any are its weights: what else lies there (optimizer states) is not read.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "*.bin", "*.pt", "*.pth")
#: What else decides what a model computes from a text.
_DESCRIPTIONS = ("*config.json", "tokenizer*", "vocab*", "merges*", "*_tokens*.json", "chat_template*", "*.model", "*.py")
#: Files up to this size are read whole; of larger ones the head and so many blocks, evenly spread.
_WHOLE_BYTES, _BLOCKS, _BLOCK_BYTES = 64 << 20, 4096, 4096
#: Numbers of a parameter in memory that are looked at: all of a small one, evenly spread ones of a large one.
_NUMBERS = 1 << 16
#: Letters of a `weights` fingerprint that stand for signs; as many follow for the rest.
_SIGNS = 16
#: Settings of a config file that say by what it was saved; and of a config how and from where a model was loaded.
_SAVED = {"_name_or_path", "transformers_version"}
_PASSING = {*_SAVED, "name_or_path", "_commit_hash", "dtype", "torch_dtype", "architectures"}
#: What else of a config changes no key and no value: what is returned, and which tokens end a text.
_NOT_OF_TOKENS = {"use_cache", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"}
_NOT_OF_TOKENS |= {"bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation", "_experts_implementation"}


def model_fingerprint(model: Any, source: str | os.PathLike[str] | None = None, revision: str | None = None) -> str:
    """The fingerprint of a model that was loaded from `source`, a folder or a Hub id; None: of the model as it is.

    With a source the model must be as it was loaded: what has been trained since is not seen.
    """
    if source is not None and os.path.isdir(source):
        return folder_fingerprint(source)
    commit = None if source is None or os.path.exists(source) else _commit(os.fspath(source), revision)
    return f"commit:{commit}" if commit else weights_fingerprint(model)


def _commit(repo_id: str, revision: str | None) -> str | None:
    """The commit that a revision of a repository is in the Hub's local cache, where loading has just put it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None  # .../snapshots/<commit>/config.json


def folder_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Of a model's folder: contents of config and tokenizer; names, sizes, headers and sampled bytes of the weights."""
    digest, root = hashlib.sha256(), Path(folder)
    for path in sorted({path for pattern in _DESCRIPTIONS for path in root.glob(pattern) if path.is_file()}):
        digest.update(f"{path.name} ".encode() + _description(path))
    found = next((paths for pattern in _WEIGHTS if (paths := sorted(root.glob(pattern)))), [])
    for path in found:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            head = file.read(8)
            digest.update(head + file.read(min(int.from_bytes(head, "little"), _WHOLE_BYTES)))  # a safetensors header
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return f"files:{digest.hexdigest()[:32]}"


def weights_fingerprint(model: Any) -> str:
    """Of a model in memory: its config, and names, shapes and sampled numbers of its parameters.

    Numbers are rounded to bfloat16, so that a checkpoint in half precision has one fingerprint in all dtypes. Of one in
    float32 that holds for the first half of the fingerprint, which sees no more of a number than its sign. Parameters that
    are not wholly in this process (on the meta device, spread over processes) count by name and shape.
    """
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _PASSING}
    signs = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    numbers = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        signs.update(f" {name} {tuple(parameter.shape)} ".encode())
        if parameter.device.type != "meta" and not hasattr(parameter, "to_local"):
            some = _sampled(parameter.detach())
            signs.update((some < 0).tobytes())
            numbers.update(some.tobytes())
    return f"weights:{signs.hexdigest()[:_SIGNS]}{numbers.hexdigest()[:_SIGNS]}"


def is_of_model(metadata: Mapping[str, Any], model: Any, fingerprint: str | None = None) -> bool | None:
    """Whether what `metadata` describes (a codebook, samples) was made with this model's weights; None where nobody knows.

    Nobody does where weights agree as far as those of one model in two dtypes would.

    fingerprint: the model's, from where it was loaded.
    """
    noted = metadata.get("model_fingerprint")
    if not isinstance(noted, str) or not noted:
        return None
    kind, _, digest = noted.partition(":")
    own = weights_fingerprint(model) if kind == "weights" else fingerprint
    if own is None or own.partition(":")[0] != kind:
        return None
    if kind == "weights" and own != noted and own.partition(":")[2][:_SIGNS] == digest[:_SIGNS]:
        return None if metadata.get("dtype") != dtype_name(model) else False
    return noted == own


def settings_of_tokens(config: Any) -> dict[str, Any]:
    """What a config says that decides the keys and values of a text, as JSON has it; not its dtype."""
    text = json.dumps(config.to_dict(), default=str)
    return dict(_without(json.loads(text, parse_constant=str), _PASSING | _NOT_OF_TOKENS))  # JSON has no infinity


def differences(noted: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which two of `settings_of_tokens` differ. Those that only one release knows are not compared."""
    return sorted(name for name in noted.keys() & own.keys() if noted[name] != own[name])


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, names) for key, inner in value.items() if key not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def dtype_name(model: Any) -> str:
    """ "float16", as metadata and result rows call it."""
    return str(model.dtype).removeprefix("torch.")


def short(fingerprint: str) -> str:
    """As much of it as people read."""
    return fingerprint.partition(":")[2][:6] or fingerprint[:6]


def _description(path: Path) -> bytes:
    """A small file's contents; a config's without what says only how it was saved."""
    data = path.read_bytes()
    if path.suffix != ".json":
        return data
    try:
        values = json.loads(data)
    except ValueError:
        return data
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in _SAVED}
    return json.dumps(values, sort_keys=True).encode()


def _sampled(x: Tensor) -> Any:
    """An array of ints, negative where the number is, -0.0 included."""
    flat = x.flatten()
    some = flat[:: max(1, flat.numel() // _NUMBERS)]
    if some.is_floating_point():
        some = some.to(torch.bfloat16).view(torch.int16)
    return some.contiguous().cpu().numpy()
