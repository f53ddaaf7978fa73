"""Codebook: the centroids of all compressed layers of a model, checked, saved and loaded; knows no cache.

On disk a codebook is a folder of two files: `codebook.safetensors` with the tensors `layers.<i>.keys` and
`layers.<i>.values`, and `codebook.json`, which says what they are. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_pqcache.codebook import hub
from hf_pqcache.config import MAX_BITS, PQConfig
from hf_pqcache.models.shapes import has_latent_attention, kv_shape, layer_configs

FORMAT, SCHEMA_VERSION = "hf-pqcache-codebook", 1
TENSOR_FILE, CONFIG_FILE = "codebook.safetensors", "codebook.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_LAYERS = 10_000


@dataclass(frozen=True, eq=False)
class LayerCodebook:
    """Centroids of one layer, one set for each KV head. Equal are those of the same numbers, on whatever device.

    Attributes:
        keys: float16 (H, M, C, dk/M), of keys after their rotary embedding.
        values: float16 (H, M, C, dv/M).
    """

    keys: Tensor
    values: Tensor
    _shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerCodebook):
            return NotImplemented
        pairs = ((self.keys, other.keys), (self.values, other.values))
        return all(torch.equal(own.detach().cpu(), others.detach().cpu()) for own, others in pairs)

    def __hash__(self) -> int:
        return hash((self.keys.shape, self.values.shape))  # reads no numbers

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What caches derive from these centroids, a kernel's tables say: made once and held in common by all of them."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    @property
    def head_dims(self) -> tuple[int, int]:
        """(dk, dv): numbers in a key and in a value of one head."""
        return self.keys.shape[1] * self.keys.shape[3], self.values.shape[1] * self.values.shape[3]

    def to(self, device: torch.device | str) -> LayerCodebook:
        return LayerCodebook(self.keys.to(device), self.values.to(device))


@dataclass(frozen=True, eq=False)
class Codebook:
    """Centroids of every compressed layer of one model. Equal are those of the same centroids and settings.

    Attributes:
        layers: by layer index; layers that are not compressed (sliding window, linear attention) are absent. Numbers of
            heads and head dimensions may differ from layer to layer.
        num_bits: bits of one code; every subspace has 2**num_bits centroids.
        num_subspaces: M of every layer; None means half of each layer's key head_dim, as in PQConfig.
        metadata: how it was made: model, tokens, seed, objective, fingerprint of the text, versions. JSON values only.
            Loaded from the Hub, also "repository": repository@commit.
        settings: other settings of PQConfig that its maker recommends, such as page_size.

    Raises ValueError when tensors, num_bits and num_subspaces do not fit each other, a centroid is not finite or a
    setting is none of PQConfig's.
    """

    layers: Mapping[int, LayerCodebook]
    num_bits: int
    num_subspaces: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a codebook needs at least one layer")
        config = self.config
        for index, layer in sorted(self.layers.items()):
            for name, x in (("keys", layer.keys), ("values", layer.values)):
                _check_tensor(f"layers.{index}.{name}", x, config, layer)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codebook):
            return NotImplemented
        sizes = self.num_bits, self.num_subspaces, self.settings
        return sizes == (other.num_bits, other.num_subspaces, other.settings) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def config(self) -> PQConfig:
        """A cache shape that this codebook fits, with defaults for everything that it leaves open."""
        return _config(self.num_subspaces, self.num_bits, self.settings)

    @property
    def nbytes(self) -> int:
        """Bytes of all centroids."""
        return sum(x.nbytes for layer in self.layers.values() for x in (layer.keys, layer.values))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over layer indices, shapes and numbers of all tensors: equal if and only if these are."""
        digest = hashlib.sha256(f"{FORMAT} {self.num_bits}".encode())
        for index, layer in sorted(self.layers.items()):
            for x in (layer.keys, layer.values):
                digest.update(f" {index} {tuple(x.shape)} ".encode())
                digest.update(x.detach().cpu().contiguous().numpy().astype("<f2").tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Codebook:
        """The same codebook with its tensors on `device`."""
        return replace(self, layers={i: layer.to(device) for i, layer in self.layers.items()})

    def check_model(self, config: Any) -> None:
        """Check against a transformers config. Raises ValueError saying what differs and what to do."""
        text = config.get_text_config(decoder=True)
        way_out = (
            f"this codebook was made for {self.metadata.get('model') or 'another model'!r}: calibrate one for this "
            "model, or load the model it belongs to"
        )
        num_layers = text.num_hidden_layers
        if outside := [i for i in self.layers if i >= num_layers]:
            raise ValueError(f"codebook has layers {outside}, the model has {num_layers} layers only; {way_out}")
        if has_latent_attention(text):
            return  # what is cached follows from no two numbers; the cache checks its first tokens
        views = layer_configs(text)
        for i, layer in sorted(self.layers.items()):
            heads, head_dim = kv_shape(views[i])
            got_heads, got_dim = layer.keys.shape[0], layer.head_dims[0]
            if heads is not None and got_heads != heads:
                raise ValueError(f"layer {i}: expected {heads} KV heads, got {got_heads} in the codebook; {way_out}")
            if head_dim is not None and got_dim != head_dim:
                raise ValueError(f"layer {i}: expected head_dim {head_dim}, got {got_dim} in the codebook; {way_out}")

    # -- files ---------------------------------------------------------------------------------------------------
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files into `folder`, which is made if need be."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"layers.{i}.{name}": x.detach().cpu().contiguous()
            for i, layer in self.layers.items()
            for name, x in (("keys", layer.keys), ("values", layer.values))
        }
        description = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "num_bits": self.num_bits,
            "num_subspaces": self.num_subspaces,
            "layers": sorted(self.layers),
            "fingerprint": self.fingerprint,
            "metadata": self.metadata,
            "settings": self.settings,
        }
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"  # first: fails before anything is written
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
        max_bytes: int = hub.GIBIBYTE,
    ) -> Codebook:
        """Load from a folder, or from a repository of the Hugging Face Hub.

        Args:
            revision: commit, branch or tag of the repository. The commit that it stood for is kept in `metadata`.
            max_bytes: of the tensor file on the Hub; a larger one is not downloaded. See `most_bytes`.

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
        layers = _read_layers(folder / TENSOR_FILE, description["layers"])
        codebook = cls(
            layers=layers,
            num_bits=description["num_bits"],
            num_subspaces=description["num_subspaces"],
            metadata={**description["metadata"], **source},
            settings=description["settings"],
        )
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
        facts = {
            "fingerprint": self.fingerprint[:16],
            "bytes": self.nbytes,
            "bits a code": self.num_bits,
            **self.metadata,
        }
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


def most_bytes(config: Any) -> int:
    """The most bytes that the tensor file of a codebook for a model of this transformers config may have.

    As many centroids as codes have values, keys and values of up to twice the announced head_dim, and the file's header.
    """
    text = config.get_text_config(decoder=True)
    shapes = [kv_shape(layer) for layer in layer_configs(text)]
    if any(heads is None or head_dim is None for heads, head_dim in shapes):
        return hub.GIBIBYTE
    numbers = sum((heads or 0) * (head_dim or 0) for heads, head_dim in shapes)
    return 2 * 2 * 2 * (1 << MAX_BITS) * numbers + _MAX_CONFIG_BYTES


def _config(num_subspaces: int | None, num_bits: int, settings: dict[str, Any]) -> PQConfig:
    """Raises ValueError, also for values of a wrong type and for what the codebook itself decides."""
    if own := sorted({"num_subspaces", "num_bits"} & set(settings)):
        raise ValueError(f"settings must not repeat {own}: the codebook's own decide")
    try:
        return PQConfig.from_dict({**settings, "num_subspaces": num_subspaces, "num_bits": num_bits})
    except TypeError as error:
        raise ValueError(str(error)) from None


def to_float16(centroids: Tensor, name: str) -> Tensor:
    """Round centroids to float16. Raises ValueError if one does not fit, which would decode as infinity."""
    rounded = centroids.to(torch.float16)
    if not rounded.isfinite().all():
        raise ValueError(
            f"{name}: a centroid of magnitude {centroids.abs().max().item():.4g} does not fit float16 (at most 65504)"
        )
    return rounded.contiguous()


def _check_tensor(name: str, x: Tensor, config: PQConfig, layer: LayerCodebook) -> None:
    """Raises ValueError, with the tensor's name, unless x is float16 (H, M, C, width), finite, and fits the config."""
    if x.dtype != torch.float16:
        raise ValueError(f"{name} has dtype {x.dtype}, expected torch.float16")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (KV heads, subspaces, centroids, numbers)")
    if layer.keys.dim() != 4 or layer.values.dim() != 4 or x.shape[0] != layer.keys.shape[0]:
        shapes = f"keys {tuple(layer.keys.shape)} and values {tuple(layer.values.shape)}"
        raise ValueError(f"{name} has {x.shape[0]} heads, its layer has {shapes}")
    try:
        subspaces = config.subspaces(*layer.head_dims)
    except ValueError as error:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: {error}") from None
    if x.shape[1] != subspaces or x.shape[2] != config.num_centroids:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: {x.shape[1]} subspaces of {x.shape[2]} centroids, but num_subspaces="
            f"{config.num_subspaces} and num_bits={config.num_bits} ask for {subspaces} of {config.num_centroids}"
        )
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
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise ValueError(f"{path} is no codebook description: format={short(data.get('format'))}, expected {FORMAT!r}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version={short(data.get('schema_version'))}, this version reads {SCHEMA_VERSION}; "
            "update hf_pqcache or make the codebook again"
        )
    if missing := sorted({"num_bits", "num_subspaces", "layers", "fingerprint", "metadata"} - set(data)):
        raise ValueError(f"{path} lacks {missing}")
    data.setdefault("settings", {})  # optional: a codebook needs none
    if not isinstance(data["settings"], dict):
        raise ValueError(f"{path}: settings must be an object, got {type(data['settings']).__name__}")
    try:
        _config(data["num_subspaces"], data["num_bits"], data["settings"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layers = data["layers"]
    if not isinstance(layers, list) or not 0 < len(layers) <= _MAX_LAYERS:
        raise ValueError(f"{path}: layers must be a list of 1 to {_MAX_LAYERS} layer indices")
    if any(type(i) is not int or not 0 <= i < _MAX_LAYERS for i in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"{path}: layers must be different integers from 0 to {_MAX_LAYERS - 1}")
    if not isinstance(data["metadata"], dict) or not isinstance(data["fingerprint"], str):
        raise ValueError(f"{path}: metadata must be an object and fingerprint a string")
    return data


def _read_layers(path: Path, indices: list[int]) -> dict[int, LayerCodebook]:
    """The tensors of exactly these layers. Raises ValueError for a damaged file and for missing or unknown tensors.

    The safetensors reader checks a file's header against its length before it allocates anything.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}; download or save it again") from None
    expected = {f"layers.{i}.{name}" for i in indices for name in ("keys", "values")}
    if missing := sorted(expected - set(tensors)):
        raise ValueError(f"{path} lacks {missing[:4]} ({len(missing)} tensors in all) that {CONFIG_FILE} announces")
    if unknown := sorted(set(tensors) - expected):
        raise ValueError(f"{path} holds {short(unknown)} ({len(unknown)} tensors in all) that {CONFIG_FILE} does not announce")
    return {i: LayerCodebook(tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"]) for i in indices}
