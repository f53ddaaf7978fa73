"""From names and settings to a session: model, cache, codebook, results; knows no task's measurements."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_pqcache import demo
from hf_pqcache.calibrate import calibrate
from hf_pqcache.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.eval import distributed, tasks
from hf_pqcache.eval.caches import CacheSpec, check_name, head_dim
from hf_pqcache.eval.demo import split_text
from hf_pqcache.eval.model_config import DEMO, ModelConfig, load_model_config
from hf_pqcache.eval.models import load_model, public_name
from hf_pqcache.eval.results import Results
from hf_pqcache.eval.session import Session
from hf_pqcache.eval.texts import read_text

#: Of the arguments of `load_model`, those that change figures; the dtype is in every row by itself.
LOADING_SETTINGS = ("quantization", "attn_implementation", "model_kwargs")


def text_of(source: str, data_dir: str | Path | None = None, *, is_calibration: bool = False) -> tuple[str, str]:
    """(text, what rows call it) of a file (plain or .xz), "demo", "task/split" or a text task's name.

    "demo" is the embedded articles: two thirds of them for calibration, the rest for evaluation. A task's bare name is its
    test split; for calibration its training split, or, where that is not there, its validation split: never its test
    split, which must be asked for as "task/test".

    Raises FileNotFoundError or ValueError saying what to give instead.
    """
    if Path(source).is_file():
        if source == DEMO or source in tasks.registry():
            warnings.warn(f"{source!r} is a file here and a built-in text; the file is taken", stacklevel=2)
        return read_text(source), Path(source).name
    if source == DEMO:
        calibration, held_out = split_text(demo.TEXT.read_text(encoding="utf-8"))
        return (calibration, DEMO) if is_calibration else (held_out, f"{DEMO}/test")
    name, _, split = source.partition("/")
    try:
        task = tasks.get(name)
    except ValueError:
        raise FileNotFoundError(
            f"{source!r} is no file, not {DEMO!r}, and no task with a text like wikitext-2-raw-v1"
        ) from None
    if not hasattr(task, "text"):
        raise ValueError(f"task {name!r} has no text; give a file, {DEMO!r}, or a task like wikitext-2-raw-v1")
    if split or not is_calibration:
        return task.text(split or "test", data_dir), f"{name}/{split or 'test'}"
    for split in ("train", "validation"):
        try:
            return task.text(split, data_dir), f"{name}/{split}"
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"{data_dir} holds neither the training nor the validation split of {name} to calibrate on; give another text, or "
        f"'{name}/test' to calibrate on what is evaluated, as MILLION does: the result rows will say so"
    )


@dataclass(frozen=True)
class Calibration:
    """How a codebook is made when none is given.

    Attributes:
        source: text, see `text_of`. tokens: how many to sample. window: tokens of one window. seed: of sample and k-means.
        merge: one codebook for all layers and heads. folder: where codebooks are kept to be found again; None keeps none.
        data_dir: where plain files of data sets lie.
    """

    source: str = DEMO
    tokens: int = 65536
    window: int = 2048
    seed: int = 0
    merge: bool = False
    folder: Path | None = None
    data_dir: Path | None = None

    @classmethod
    def of(cls, config: ModelConfig, **changes: Any) -> Calibration:
        return cls(
            source=config.calibration_text,
            tokens=config.calibration_tokens,
            window=config.window_tokens,
            seed=config.calibration_seed,
            **changes,
        )

    def codebook(self, model: Any, tokenizer: Any, model_name: str, config: PQConfig, progress: bool = True) -> Codebook:
        """The codebook for `config`, from `folder` if it was made before."""
        text, source = text_of(self.source, self.data_dir, is_calibration=True)
        identity = {
            "model": model_name,
            "dtype": str(model.dtype),
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "codes": [config.subspaces(head_dim(model)), config.num_bits, config.sink_tokens],
            **{name: getattr(self, name) for name in ("source", "tokens", "window", "seed", "merge")},
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        folder = None if self.folder is None else self.folder / key
        if folder is not None and (folder / "codebook.json").is_file():
            return Codebook.from_pretrained(folder)
        options: dict[str, Any] = {"num_tokens": self.tokens, "window": self.window, "seed": self.seed, "merge": self.merge}
        book = calibrate(model, tokenizer, text, config, progress=progress, **options)
        book = replace(book, metadata={**book.metadata, "source": source})
        if folder is not None:
            book.save_pretrained(folder)
        return book


def open_session(
    model: str,
    cache: str = "dynamic",
    *,
    overrides: Mapping[str, Any] | None = None,
    codebook: str | None = None,
    calibration: str | None = None,
    merge: bool = False,
    data_dir: Path | None = None,
    device: str | None = None,
    results: Path | None = None,
    force: bool = False,
    progress: bool = True,
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
    **loading: Any,
) -> tuple[Session, ModelConfig, Calibration]:
    """Load everything that a measurement needs.

    Args:
        model: a name of model_configs/, a YAML file, a folder or a Hub id.
        cache: name and bits, see `CacheSpec.parse`; for pq without bits the model config decides the shape.
        overrides: settings of the model config that win over its file.
        codebook: folder or Hub repository; without one a pq cache is calibrated.
        calibration: text to do that on, see `text_of`; None is the model config's.
        device: see `load_model`. loading: more of its arguments; dtype, quantization, attn_implementation, ...
        results: JSONL file. Codebooks made here are kept in a folder beside it.

    Raises FileNotFoundError, ValueError, OSError with the way out.
    """
    config = load_model_config(model, overrides)
    check_name(cache)
    loaded, tokenizer = load_model(
        config.source, revision=config.revision, device=device or distributed.local_device(), **loading
    )
    config.check(loaded.config)
    name = public_name(config.source)
    folder = None if results is None else results.with_suffix(".codebooks")
    learning = Calibration.of(config, merge=merge, folder=folder, data_dir=data_dir)
    learning = learning if calibration is None else replace(learning, source=calibration)
    session = Session(
        model=loaded,
        tokenizer=tokenizer,
        model_name=name,
        results=Results(results, is_writer=distributed.is_main()),
        force=force,
        progress=progress and distributed.is_main(),
        seed=seed,
        notes=dict(notes or {}),
        loading={name: loading[name] for name in LOADING_SETTINGS if loading.get(name)},
    )
    spec = CacheSpec.parse(cache, head_dim(loaded), config.pq_config)
    book = codebook or (None if ":" in cache else config.codebook)
    return session.with_cache(with_codebook(session, spec, learning, book, config.codebook_revision)), config, learning


def with_codebook(
    session: Session, spec: CacheSpec, learning: Calibration, codebook: str | None = None, revision: str | None = None
) -> CacheSpec:
    """`spec` with the codebook at `codebook`, or else with a calibrated one; anything but pq as it is."""
    if spec.name != "pq":
        return spec
    if codebook is not None:
        book = Codebook.from_pretrained(codebook, revision=revision)
    else:
        with distributed.main_first():  # the others find what it has made
            book = learning.codebook(session.model, session.tokenizer, session.model_name, spec.config, session.progress)
    book.check_model(session.model.config)
    subspaces = book.num_subspaces if book.num_subspaces is not None else head_dim(session.model) // 2
    return replace(spec, settings={**spec.settings, "num_subspaces": subspaces, "num_bits": book.num_bits}, codebook=book)
