"""MILLION's four stages on one model: baseline, sampling, training, evaluation; each can run alone, in its own process.

The stages meet in a folder: `codebook/`, `results.jsonl` and, where sampling runs alone or it is asked for,
`samples.safetensors` (what layers put into the cache).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_pqcache.codebook.calibrate import learn
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.codebook.samples import KeptSamples, LiveSamples, Samples, keep
from hf_pqcache.config import PQConfig
from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure.breakdown import STEPS, WARM_UP
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.session.caches import CacheSpec, codes_of, codes_text, head_dim_of
from hf_pqcache.eval.session.given import RECOMMENDED
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Calibration
from hf_pqcache.models.identity import is_of_model
from hf_pqcache.models.positions import max_positions

STAGES = ("baseline", "sampling", "training", "evaluation")


@dataclass(frozen=True)
class Pipeline:
    """One experiment.

    Attributes:
        session: model and results; its cache is not looked at.
        config: shape of the compressed cache.
        calibration: text and numbers of the sample, and whether keys and values are normalised or coded as MILLION does.
        dataset: name of a task with a text.
        folder: where the stages meet.
        window, stride, limit: of the perplexity; see `run_perplexity`.
        with_breakdown: also measure the stages of a decode step, after a prompt of `window` tokens.
        keep_samples: leave samples.safetensors behind where training follows in the same run, too.
    """

    session: Session
    config: PQConfig
    calibration: Calibration
    dataset: str
    folder: Path
    window: int = 2048
    stride: int | None = None
    limit: int | None = None
    with_breakdown: bool = False
    keep_samples: bool = False

    def run(self, stages: Sequence[str] = STAGES) -> list[Row]:
        """Run `stages` in their natural order -> the rows that they made or found.

        Sampling and training in one run need no samples on disk: layers are sampled as training comes to them.

        Raises ValueError for an unknown stage, FileNotFoundError if a stage lacks what an earlier one makes.
        """
        if unknown := [stage for stage in stages if stage not in STAGES]:
            raise ValueError(f"unknown stages {unknown}; use {list(STAGES)}")
        self.check(stages)
        rows: list[Row] = []
        for stage in (stage for stage in STAGES if stage in stages):
            if stage == "sampling" and "training" in stages and not self.keep_samples:
                continue
            if stage == "training" and "sampling" in stages and not self.keep_samples:
                self._train(self._live)
                continue
            rows += getattr(self, stage)()
        return rows

    def check(self, stages: Sequence[str]) -> None:
        """Raises what `run` would raise for want of a text or of an earlier stage's work, before any work is done."""
        if "sampling" in stages:
            _ = self.calibration.text
        elif "training" in stages:
            self._kept()
        if "evaluation" in stages and "training" not in stages:
            self._codebook()

    def baseline(self) -> list[Row]:
        """Perplexity (and breakdown) of the exact cache."""
        return self._measure(CacheSpec("dynamic"), ("exact",))

    def sampling(self) -> list[Row]:
        """Keys and values of the calibration text, into samples.safetensors; kept if they are there already."""
        asked = self.calibration.asked(self.session, self.config)
        if self._samples_path.is_file() and not self.session.force and _has(KeptSamples(self._samples_path).metadata, asked):
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        keep(self._live(), self._samples_path, asked)
        return []

    def training(self) -> list[Row]:
        """k-means over the samples of samples.safetensors, into codebook/."""
        self._train(self._kept)
        return []

    @property
    def _samples_path(self) -> Path:
        return self.folder / "samples.safetensors"

    def _live(self) -> LiveSamples:
        ids = self.calibration.tokens_of(self.session)
        options: dict[str, Any] = {"num_tokens": self.calibration.tokens, "window": self.calibration.window}
        options |= {"seed": self.calibration.seed, "progress": self.session.progress}
        return LiveSamples(self.session.model, None, ids, self.config, **options)

    def _kept(self) -> KeptSamples:
        if not self._samples_path.is_file():
            raise FileNotFoundError(f"{self._samples_path} is not there: run the sampling stage first (-p sampling training)")
        found = KeptSamples(self._samples_path)
        if not _has(found.metadata, asked := self.calibration.asked(self.session, self.config)):
            names = [name for name in asked if found.metadata.get(name) != asked[name]]
            raise ValueError(f"{self._samples_path} was sampled with another {', '.join(names)}: run the sampling stage again")
        return found

    def _train(self, samples: Callable[[], Samples]) -> None:
        """Learn codebook/, unless it is there already, learnt as asked."""
        asked = self.calibration.asked(self.session, self.config)
        folder = self.folder / "codebook"
        if (folder / "codebook.json").is_file() and not self.session.force:
            book = Codebook.from_pretrained(folder)
            is_same = _has(book.metadata, asked) and book.settings.get("page_size") == self.config.page_size
            if is_same and self._fits(book):
                return
        book = learn(
            samples(),
            self.config,
            normalise=self.calibration.normalise,
            seed=self.calibration.seed,
            device=self.session.device,
            progress=self.session.progress,
        )
        settings = {name: getattr(self.config, name) for name in RECOMMENDED}
        replace(book, metadata={**book.metadata, **asked}, settings=settings).save_pretrained(folder)

    def _fits(self, book: Codebook) -> bool:
        width = head_dim_of(self.session.model.config)
        is_same = not width or codes_of(book, width) == codes_of(self.config, width)
        return is_same and book.is_normalised == self.calibration.normalise

    def _codebook(self) -> Codebook:
        """The codebook of the folder. Raises FileNotFoundError or ValueError unless it is this model's and of this shape."""
        folder = self.folder / "codebook"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: run sampling and training first")
        book = Codebook.from_pretrained(folder)
        book.check_model(self.session.model.config)
        again = "run sampling and training again, or use another --output"
        if is_of_model(book.metadata, self.session.model, self.session.fingerprint or None) is False:
            raise ValueError(f"the codebook in {self.folder} was learnt from other weights than this model's: {again}")
        if not self._fits(book):
            width = head_dim_of(self.session.model.config)
            found, wanted = (
                f"{codes_text(codes_of(source, width)) if width else 'codes'}, {'' if is_normalised else 'not '}normalised"
                for source, is_normalised in ((book, book.is_normalised), (self.config, self.calibration.normalise))
            )
            raise ValueError(f"the codebook in {self.folder} is {found}; expected {wanted}: {again}")
        return book

    def evaluation(self) -> list[Row]:
        """Perplexity under the codebook, as deployed (stream) and as MILLION reports it (distort), and the breakdown.

        No cache here runs MILLION's codes; the breakdown is that of ours, of the same shape.
        """
        return self._measure(CacheSpec("pq", self.config.to_dict(), self._codebook()), ("stream", "distort"))

    def _measure(self, spec: CacheSpec, modes: Sequence[str]) -> list[Row]:
        session, task = self.session.with_cache(spec), tasks.get(self.dataset)
        options: dict[str, Any] = {"window": self.window, "stride": self.stride, "limit": self.limit}
        data_dir = self.calibration.data_dir
        rows = [task.run(session, split="test", data_dir=data_dir, mode=mode, **options) for mode in modes]
        if self.with_breakdown:
            if spec.codebook is not None and not spec.codebook.is_normalised:
                session = session.with_cache(replace(spec, codebook=None))
            limit = max_positions(session.model.config)
            tokens = lengths_within(limit, None, WARM_UP + STEPS, "a breakdown", offered=(self.window,))[0]
            rows += tasks.get("breakdown").run(session, tokens=tokens, steps=STEPS)
        return rows


def _has(found: dict[str, Any], asked: dict[str, Any]) -> bool:
    return all(found.get(name) == value for name, value in asked.items())
