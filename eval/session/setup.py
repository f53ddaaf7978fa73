"""From names and settings to a session: model, cache, codebook, results; knows no task's measurements."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_pqcache.codebook.calibrate import calibrate
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.eval.session import distributed
from hf_pqcache.eval.session.caches import CODES, CacheSpec, check_name, codes_of, head_dim_of, split_press
from hf_pqcache.eval.session.given import RECOMMENDED, check_data_dir, check_given
from hf_pqcache.eval.session.model_config import DEMO, ModelConfig, load_model_config, stated_settings
from hf_pqcache.eval.session.models import check_device, load_config, load_model, load_tokenizer, public_name, token_ids
from hf_pqcache.eval.session.results import Results, Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.texts import is_data_set, text_of
from hf_pqcache.models.identity import dtype_name, folder_fingerprint, is_of_model, model_fingerprint
from hf_pqcache.models.positions import max_positions

#: Of the arguments of `load_model`, those that change figures; the dtype is in every row by itself.
LOADING_SETTINGS = ("quantization", "attn_implementation", "model_kwargs")


@dataclass(frozen=True)
class Calibration:
    """How a codebook of the model's own is made, where one is asked for.

    Attributes:
        source: text, see `text_of`. tokens: how many to sample. window: tokens of one window. seed: of sample and k-means.
        normalise: whether keys and values are normalised; False is MILLION's way, see `learn`.
        data_dir: where plain files of data sets lie.
    """

    source: str = DEMO
    tokens: int = 65536
    window: int = 2048
    seed: int = 0
    normalise: bool = True
    data_dir: Path | None = None

    @classmethod
    def of(cls, config: ModelConfig, **changes: Any) -> Calibration:
        made: dict[str, Any] = {
            "source": config.calibration_text,
            "tokens": config.calibration_tokens,
            "window": config.window_tokens,
            "seed": config.calibration_seed,
        }
        return cls(**made | {name: value for name, value in changes.items() if value is not None})

    @cached_property
    def text(self) -> tuple[str, str]:
        """(the text, what rows call it). Raises FileNotFoundError or ValueError saying what to give instead."""
        return text_of(self.source, self.data_dir, is_calibration=True)

    def ids(self, tokenizer: Any) -> Any:
        """Token ids int64 (N) of the text."""
        if "_ids" not in self.__dict__:  # tokenized once: it may be megabytes
            self.__dict__["_ids"] = token_ids(tokenizer, self.text[0])
        return self.__dict__["_ids"]

    def check(self, tokenizer: Any, config: PQConfig) -> None:
        """Raises ValueError if the text fills no page."""
        found, needed = self.ids(tokenizer).numel(), config.sink_tokens + config.page_size
        if found < needed:
            raise ValueError(
                f"the text {self.text[1]} has {found} tokens, {config.sink_tokens} sinks and a page of {config.page_size} take "
                f"{needed}: give a longer one with --calibration"
            )

    def asked(self, session: Session, config: PQConfig) -> dict[str, Any]:
        """All that decides which keys and values are sampled; noted in samples and codebooks. JSON values."""
        text, source = self.text
        return {
            "model_fingerprint": session.model_fingerprint,
            "dtype": dtype_name(session.model),
            **({"loading": session.loading} if session.loading else {}),
            "source": source,
            "source_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "asked_tokens": self.tokens,
            "asked_window": self.window,
            "seed": self.seed,
            "skipped_tokens_per_window": config.sink_tokens,
        }

    def codebook(self, session: Session, config: PQConfig) -> Codebook:
        """A codebook of the session's model for `config`."""
        ids = self.tokens_of(session)
        options: dict[str, Any] = {"num_tokens": self.tokens, "window": self.window, "seed": self.seed}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the text is short has been said
            book = calibrate(session.model, None, ids, config, normalise=self.normalise, progress=session.progress, **options)
        return replace(book, metadata={**book.metadata, **self.asked(session, config)})

    def tokens_of(self, session: Session) -> Any:
        """Token ids int64 (N) of the text; says which text that is, and whether it is long enough."""
        _, source = self.text
        ids = self.ids(session.tokenizer)
        name = "the embedded articles" if source == DEMO else source
        session.say(f"calibrating on {name}, {min(ids.numel(), self.tokens):,} of its {ids.numel():,} tokens")
        if ids.numel() < self.tokens:
            session.say(
                f"note: that text is too short, {self.tokens:,} tokens were asked for and a better codebook comes from more: "
                "give a longer one with --calibration, or ask for fewer with --calibration-tokens"
            )
        return ids


@dataclass
class Setup:
    """Everything about a measurement that is known, and checked, before a model's weights are loaded.

    Attributes:
        config: the model config. hf_config: the model's own. loading: arguments of `load_model`.
        specs: the caches, as far as they are known without a codebook.
        book: the codebook that was asked for, if any; is_recommended: the settings in which it is followed.
        learning: how codebooks of the model's own are made. learns: whether they are, for pq caches without `book`.
        needs_text: whether there is something to calibrate. show: called with every row as soon as it is there.
    """

    config: ModelConfig
    hf_config: Any
    specs: list[CacheSpec]
    learning: Calibration
    results: Results
    loading: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    progress: bool = True
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    book: Codebook | None = None
    is_recommended: Collection[str] = ()
    learns: bool = False
    needs_text: bool = False
    show: Callable[[Row], None] | None = None
    _learnt: dict[tuple[Any, ...], Codebook] = field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        """Tokens that the model can hold, by its own config and the model config; None where neither sets an end."""
        known = [x for x in (max_positions(self.hf_config), self.config.max_context_tokens) if x is not None]
        return min(known, default=None)

    @property
    def window(self) -> int:
        """Tokens of a perplexity window: the model config's, or what the model can hold."""
        return min(self.config.window_tokens, self.limit or self.config.window_tokens)

    @cached_property
    def tokenizer(self) -> Any:
        remote = {"trust_remote_code": self.loading.get("trust_remote_code", False)}
        return load_tokenizer(self.config.source, revision=self.config.revision, **remote)

    def open(self) -> Session:
        """Load the model. Its cache is the exact one.

        Raises ValueError before, if the text to calibrate on is too short.
        """
        source = self.config.source
        if self.needs_text:
            self.learning.check(self.tokenizer, self.config.pq_config)
        fingerprint = folder_fingerprint(source) if Path(source).is_dir() else None  # before: what is loaded next
        model, tokenizer = load_model(source, revision=self.config.revision, **self.loading)
        return Session(
            model=model,
            tokenizer=tokenizer,
            model_name=public_name(source),
            results=self.results,
            force=self.force,
            progress=self.progress,
            seed=self.seed,
            notes=self.notes,
            loading={name: self.loading[name] for name in LOADING_SETTINGS if self.loading.get(name)},
            fingerprint=fingerprint or model_fingerprint(model, source, self.config.revision),
            show=self.show,
        )

    def ready(self, session: Session, spec: CacheSpec) -> Session:
        """The session under `spec`: with the codebook that was asked for, or one learnt on the text that was; else as it is."""
        book = self.book
        if spec.name != "pq" or not (book or self.learns):
            return session.with_cache(spec)
        if book is None:
            key = (spec.config.bits, *(spec.settings[name] for name in CODES))
            if key not in self._learnt:
                self._learnt[key] = self.learning.codebook(session, spec.config)
            book = self._learnt[key]
        return session.with_cache(fitted(session, spec, book, self.is_recommended))


def prepare(
    model: str,
    caches: Sequence[str] = ("dynamic",),
    *,
    overrides: Mapping[str, Any] | None = None,
    codebook: str | None = None,
    calibration: str | None = None,
    normalise: bool = True,
    learns: bool = False,
    needs_text: bool = True,
    data_dir: Path | None = None,
    reads_data: bool = True,
    device: str | None = None,
    results: Path | None = None,
    force: bool = False,
    progress: bool = True,
    seed: int | None = None,
    notes: Mapping[str, Any] | None = None,
    rows_file: Path | None = None,
    show: Callable[[Row], None] | None = None,
    **loading: Any,
) -> Setup:
    """Check everything that a measurement needs, and load nothing heavy.

    Args:
        model: a name of model_configs/, a YAML file, a folder or a Hub id.
        caches: names and bits, see `CacheSpec.parse`, maybe with a press, "pq:4+snapkv:0.5"; for pq without bits the model
            config decides the shape.
        overrides: settings of the model config that win over its file. One that none of the caches has is refused.
        codebook: folder or Hub repository; None is the model config's, or the one that comes with the package.
        calibration: text to learn a codebook of the model's own from, see `text_of`; None learns none.
        learns: learn one in any case, from the model config's text where no other is named. normalise: see `learn`.
        needs_text: whether the text will be read at all. reads_data: whether some other data set will be.
        device: see `load_model`. loading: more of its arguments; dtype, quantization, attn_implementation, ...
        results: JSONL file.
        seed: of all that is drawn at random; None is 0, and the model config's for calibration.
        rows_file: where rows go without `results`. show: called with every row as soon as it is there.

    Raises FileNotFoundError, ValueError, OSError with the way out.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    config = load_model_config(model, overrides)
    caches, presses = zip(*map(split_press, caches), strict=True)
    for text in caches:
        check_name(text)
    loading["device"] = check_device(device or distributed.local_device())
    options = {name: loading[name] for name in ("trust_remote_code", "model_kwargs") if name in loading}
    hf_config = load_config(config.source, revision=config.revision, **options)
    config.check(hf_config)
    width = head_dim_of(hf_config)
    specs = [CacheSpec.parse(text, width, config.pq_config) for text in caches]
    specs = [replace(spec, press=press) for spec, press in zip(specs, presses, strict=True)]
    own = codebook or (config.codebook if "pq" in caches and not (learns or calibration) else None)
    book = None if own is None else Codebook.from_pretrained(own, revision=None if codebook else config.codebook_revision)
    sources = {"--codebook": codebook, "--calibration": calibration}
    check_given(caches, given, book, sources, head_dim=width, learns=learns)
    if book is not None:
        book.check_model(hf_config)
    learns = (learns or calibration is not None) and book is None
    changes: dict[str, Any] = {"source": calibration, "seed": seed, "data_dir": data_dir}
    learning = Calibration.of(config, normalise=normalise, **changes)
    limit = max_positions(hf_config)
    learning = replace(learning, window=min(learning.window, limit or learning.window))
    needs_text = needs_text and learns
    check_data_dir(data_dir, is_read=reads_data or (needs_text and is_data_set(learning.source)))
    if needs_text:
        _ = learning.text  # found, or refused now
    is_fixed = {*given, *(() if codebook else stated_settings(model))}
    return Setup(
        config=config,
        hf_config=hf_config,
        specs=specs,
        learning=learning,
        results=Results(results or rows_file, is_writer=distributed.is_main()),
        show=show,
        force=force,
        progress=progress and distributed.is_main(),
        seed=seed or 0,
        notes=dict(notes or {}),
        loading=loading,
        book=book,
        learns=learns,
        needs_text=needs_text,
        is_recommended=[name for name in RECOMMENDED if name not in is_fixed],
    )


def fitted(session: Session, spec: CacheSpec, book: Codebook, is_recommended: Collection[str] = ()) -> CacheSpec:
    """A pq `spec` with `book`, whose codes it takes, and those of its other settings that are named.

    Says so if the codebook was learnt from other weights: it may serve a fine-tune, but never unsaid.
    """
    book.check_model(session.model.config)
    if is_of_model(book.metadata, session.model, session.fingerprint or None) is False:
        made_for = book.metadata.get("model") or "another model"
        session.say(
            f"note: the codebook was learnt from other weights than those of {session.model_name} (from {made_for}, "
            f"{book.metadata['model_fingerprint']}), and its rows say so; calibrate one for this model, unless that is wanted"
        )
    settings = {**spec.settings, **{name: value for name, value in book.settings.items() if name in is_recommended}}
    width = head_dim_of(session.model.config)
    if width and codes_of(spec.config, width) != codes_of(book, width):
        settings |= codes_of(book, width)
    return replace(spec, settings=settings, codebook=book)
