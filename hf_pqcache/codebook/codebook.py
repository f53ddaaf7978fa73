"""Codebook: the centroids by which keys and values are coded, checked, saved and loaded; knows no cache.

On disk a codebook is a folder of two files: `codebook.safetensors` with the tensors `keys` and `values`, and
`codebook.json`, which says what they are. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any, NoReturn, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_pqcache.codebook import hub
from hf_pqcache.config import MAX_BITS, MIN_BITS, CodeShape, PQConfig, Side
from hf_pqcache.models.shapes import has_latent_attention, kv_shape, layer_configs

FORMAT, SCHEMA_VERSION = "hf-pqcache-codebook", 2
TENSOR_FILE, CONFIG_FILE = "codebook.safetensors", "codebook.json"
#: Most bytes of either file: 256 subspaces of 256 centroids of 256 numbers, twice, would be a mistake.
_MAX_CONFIG_BYTES, MAX_TENSOR_BYTES = 1 << 20, 1 << 26
#: Largest gain: a code of 4 bits for 64 numbers asks for 18.
MOST_GAIN = 100.0
#: Settings of PQConfig that are the codebook's own to decide.
_OWN = {"bits", "num_subspaces", "num_bits", "value_subspaces", "value_bits"}


@dataclass(frozen=True, eq=False)
class Codebook:
    """Centroids of keys and of values, one set each for all layers and heads of a model, or of every model.

    Attributes:
        keys: float16 (S, C, width): S sets of C centroids of `width` numbers. One set serves all subspaces of normalised
            keys (`normalise`). Without normalisation, as MILLION has it (Wang et al. 2025), S is the number of subspaces;
            such a codebook is for comparison (`pqcache run -m`), caches refuse it.
        values: float16 (S, C, width), its own C and width.
        gains: of keys and of values: what is coded is multiplied by it first. Centroids are means and so shorter than what
            they stand for; these are longer by `gain`, so that what is decoded is right on average. Softmax averages noise
            away, but not a bias.
        metadata: how it was made: model, tokens, seed, objective, fingerprint of the text, versions. JSON values only.
            Loaded from the Hub, also "repository": repository@commit.
        settings: settings of PQConfig that its maker recommends, such as page_size.

    Two are equal if their centroids and settings are. Raises ValueError when a tensor has another shape or dtype, a
    centroid is not finite or a setting is none of PQConfig's.
    """

    keys: Tensor
    values: Tensor
    gains: tuple[float, float] = (1.0, 1.0)
    metadata: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    _shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, x in (("keys", self.keys), ("values", self.values)):
            _check_tensor(name, x)
        _check_settings(self.settings)
        if len(self.gains) != 2 or not all(isinstance(gain, float) and 0.5 <= gain <= MOST_GAIN for gain in self.gains):
            raise ValueError(f"gains={short(self.gains)} must be two numbers from 0.5 to {MOST_GAIN:g}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codebook):
            return NotImplemented
        return self.settings == other.settings and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def is_normalised(self) -> bool:
        """Whether its centroids are of normalised keys and values."""
        return self.keys.shape[0] == self.values.shape[0] == 1

    def side(self, which: Side) -> Tensor:
        """float16 (S, C, width) of keys or of values."""
        return self.keys if which == "key" else self.values

    def gain(self, which: Side) -> float:
        return self.gains[which == "value"]

    def codes(self, which: Side, head_dim: int) -> CodeShape:
        """How it codes vectors of `head_dim` numbers. Raises ValueError if its subspaces do not cut them."""
        sets, centroids, width = self.side(which).shape
        if head_dim % width or (sets > 1 and sets != head_dim // width):
            raise ValueError(f"a codebook of {sets} x {centroids} centroids of {width} numbers fits no {which}s of {head_dim}")
        return CodeShape(head_dim // width, centroids.bit_length() - 1)

    def config(self, head_dim: int, value_dim: int | None = None) -> PQConfig:
        """The cache's shape for keys and values of so many numbers, with defaults for everything that it leaves open."""
        key, value = self.codes("key", head_dim), self.codes("value", value_dim or head_dim)
        sizes = {"num_subspaces": key.num_subspaces, "num_bits": key.num_bits}
        sizes |= {"value_subspaces": value.num_subspaces, "value_bits": value.num_bits}
        return PQConfig.from_dict({**self.settings, **sizes})

    @property
    def nbytes(self) -> int:
        """Bytes of all centroids."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over shapes and numbers of both tensors, and the gains: equal if and only if these are."""
        digest = hashlib.sha256(f"{FORMAT} {SCHEMA_VERSION} {self.gains}".encode())
        for x in (self.keys, self.values):
            digest.update(f" {tuple(x.shape)} ".encode())
            digest.update(x.detach().cpu().contiguous().numpy().astype("<f2").tobytes())
        return digest.hexdigest()

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What caches derive from these centroids, a kernel's tables say: made once and held in common by all of them."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> Codebook:
        """The same codebook with its tensors on `device`, made once for each."""
        device = torch.device(device)
        if self.keys.device == device:
            return self
        moved: Codebook = self.shared(
            ("device", device), lambda: replace(self, keys=self.keys.to(device), values=self.values.to(device))
        )
        return moved

    def check_model(self, config: Any) -> None:
        """Check against a transformers config. Raises ValueError saying what differs and what to do."""
        way_out = f"it was made for {self.metadata.get('model') or 'another model'!r}: use one of this model, or none at all"
        text = config.get_text_config(decoder=True)
        if has_latent_attention(text):
            return  # what is cached follows from no two numbers; the cache checks its first tokens
        for i, layer in enumerate(layer_configs(text)):
            if (head_dim := kv_shape(layer)[1]) is None:
                continue
            try:
                for which in get_args(Side):
                    self.codes(which, head_dim)
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}; {way_out}") from None

    # -- files ---------------------------------------------------------------------------------------------------
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files into `folder`, which is made if need be."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        description = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "gains": self.gains,
            "metadata": self.metadata,
            "settings": self.settings,
        }
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"  # first: fails before anything is written
        tensors = {"keys": self.keys.detach().cpu().contiguous(), "values": self.values.detach().cpu().contiguous()}
        save_file(tensors, path / TENSOR_FILE, metadata={"format": "pt"})
        (path / CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        max_bytes: int = MAX_TENSOR_BYTES,
    ) -> Codebook:
        """Load from a folder, or from a repository of the Hugging Face Hub.

        Args:
            revision: commit, branch or tag of the repository. The commit that it stood for is kept in `metadata`.
            max_bytes: of the tensor file on the Hub; a larger one is not downloaded.

        Raises:
            FileNotFoundError: no such folder, or one of the two files is missing.
            ValueError: a file is broken, too large or does not say what it must; the message says which and why.
            What huggingface_hub raises: no such repository or revision, no access, no connection.
        """
        name = os.fspath(folder_or_repo_id)
        folder, source = Path(name), {}
        if not _is_folder(folder):
            if isinstance(folder_or_repo_id, os.PathLike) or name.count("/") != 1 or name.startswith((".", "/", "~")):
                raise FileNotFoundError(f"there is no folder {name[:300]!r}, and it is no Hub repository id like 'user/name'")
            snapshot = hub.download(
                name,
                {CONFIG_FILE: _MAX_CONFIG_BYTES, TENSOR_FILE: max_bytes},
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
            folder, source = snapshot.folder, {"repository": f"{name}@{snapshot.commit}"}
        for required in (CONFIG_FILE, TENSOR_FILE):
            if not (folder / required).is_file():
                raise FileNotFoundError(f"{name!r} holds no {required}; a codebook is {CONFIG_FILE} and {TENSOR_FILE}")
        description = _read_description(folder / CONFIG_FILE)
        tensors = _read_tensors(folder / TENSOR_FILE)
        known = {"gains": tuple(description["gains"]), "settings": description["settings"]}
        codebook = cls(tensors["keys"], tensors["values"], **known, metadata={**description["metadata"], **source})
        if codebook.fingerprint != description["fingerprint"]:
            raise ValueError(
                f"{folder / TENSOR_FILE} is not the file that {CONFIG_FILE} describes (fingerprint "
                f"{codebook.fingerprint[:12]}, expected {short(description['fingerprint'][:12])}); download or save both again"
            )
        return codebook if torch.device(device).type == "cpu" else codebook.to(device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload PQ codebook",
        create_pr: bool = False,
    ) -> str:
        """Upload both files and a model card to the Hugging Face Hub -> address of the commit."""
        facts = {"fingerprint": self.fingerprint[:16], "bytes": self.nbytes, **self.metadata}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            Path(folder, "README.md").write_text(hub.model_card(repo_id, facts), encoding="utf-8")
            return hub.upload(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )


def to_float16(centroids: Tensor, name: str) -> Tensor:
    """Round centroids to float16. Raises ValueError if one does not fit, which would decode as infinity."""
    rounded = centroids.to(torch.float16)
    if not rounded.isfinite().all():
        raise ValueError(
            f"{name}: a centroid of magnitude {centroids.abs().max().item():.4g} does not fit float16 (at most 65504)"
        )
    return rounded.contiguous()


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError for settings that PQConfig does not take, and for those that the codebook itself decides."""
    if own := sorted(_OWN & set(settings)):
        raise ValueError(f"settings must not repeat {own}: the codebook's own decide")
    try:
        PQConfig.from_dict(settings)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _check_tensor(name: str, x: Tensor) -> None:
    """Raises ValueError, with the tensor's name, unless x is float16 (S, C, width), C a power of two, and finite."""
    if x.dtype != torch.float16:
        raise ValueError(f"{name} has dtype {x.dtype}, expected torch.float16")
    if x.dim() != 3 or 0 in x.shape or x.shape[0] > 256:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (1 or subspaces, centroids, numbers)")
    if x.shape[1] not in (legal := [1 << bits for bits in range(MIN_BITS, MAX_BITS + 1)]):
        raise ValueError(f"{name} has {x.shape[1]} centroids; use one of {legal}")
    if not x.isfinite().all():
        raise ValueError(f"{name} contains NaN or infinity; the file is damaged, or calibration overflowed")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than any file system takes
        return False


def _refuse_constant(name: str) -> NoReturn:
    """Python's parser takes NaN and Infinity, which are no JSON and could not be saved again."""
    raise ValueError(f"{name} is no number of JSON")


def _read_description(path: Path) -> dict[str, Any]:
    """codebook.json as a dict whose keys and types have been checked. Raises ValueError naming what is wrong."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; no codebook description needs over {_MAX_CONFIG_BYTES}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        json.dumps(data, indent=2)  # what is nested too deeply could not be saved again
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise ValueError(f"{path} is no codebook description: format={short(data.get('format'))}, expected {FORMAT!r}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version={short(data.get('schema_version'))}, this version reads {SCHEMA_VERSION}. A file of an "
            "older one: leave it out, caches need no codebook any more. Of a newer one: update hf_pqcache"
        )
    if missing := sorted({"fingerprint", "gains", "metadata"} - set(data)):
        raise ValueError(f"{path} lacks {missing}")
    data.setdefault("settings", {})  # optional: a codebook needs none
    if not isinstance(data["settings"], dict):
        raise ValueError(f"{path}: settings must be an object, got {type(data['settings']).__name__}")
    try:
        _check_settings(data["settings"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if (
        not isinstance(data["metadata"], dict)
        or not isinstance(data["fingerprint"], str)
        or not isinstance(data["gains"], list)
    ):
        raise ValueError(f"{path}: metadata must be an object, fingerprint a string and gains a list")
    return data


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors `keys` and `values`. Raises ValueError for a damaged file and for missing or unknown tensors.

    The safetensors reader checks a file's header against its length before it allocates anything.
    """
    if path.stat().st_size > MAX_TENSOR_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; no codebook has over {MAX_TENSOR_BYTES}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}; download or save it again") from None
    if set(tensors) != {"keys", "values"}:
        raise ValueError(f"{path} holds {short(sorted(tensors))}, expected the tensors 'keys' and 'values'")
    return tensors
