"""MILLION's four stages on one model: baseline, sampling, training, evaluation; each can run alone, in its own process.

The stages meet in a folder: `samples.safetensors` (what layers put into the cache), `codebook/`, `results.jsonl`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_pqcache.calibrate import Samples, learn, sample
from hf_pqcache.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.eval import tasks
from hf_pqcache.eval.caches import CacheSpec
from hf_pqcache.eval.results import Row
from hf_pqcache.eval.session import Session
from hf_pqcache.eval.setup import Calibration, text_of

STAGES = ("baseline", "sampling", "training", "evaluation")


@dataclass(frozen=True)
class Pipeline:
    """One experiment.

    Attributes:
        session: model and results; its cache is not looked at.
        config: shape of the compressed cache.
        calibration: text and numbers of the sample, and whether one codebook serves all.
        dataset: name of a task with a text.
        folder: where the stages meet.
        window, stride, limit: of the perplexity; see `run_perplexity`.
        with_breakdown: also measure the stages of a decode step, after a prompt of `window` tokens.
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

    def run(self, stages: Sequence[str] = STAGES) -> list[Row]:
        """Run `stages` in their natural order -> the rows that they made or found.

        Raises ValueError for an unknown stage, FileNotFoundError if a stage lacks what an earlier one makes.
        """
        if unknown := [stage for stage in stages if stage not in STAGES]:
            raise ValueError(f"unknown stages {unknown}; use {list(STAGES)}")
        rows: list[Row] = []
        for stage in (stage for stage in STAGES if stage in stages):
            rows += getattr(self, stage)()
        return rows

    def baseline(self) -> list[Row]:
        """Perplexity (and breakdown) of the exact cache."""
        return self._measure(CacheSpec("dynamic"), ("exact",))

    def sampling(self) -> list[Row]:
        """Keys and values of the calibration text, into samples.safetensors; kept if they are there already."""
        text, source = text_of(self.calibration.source, self.calibration.data_dir, is_calibration=True)
        path, settings = self.folder / "samples.safetensors", self._sampled(text, source)
        if path.is_file() and not self.session.force:
            made = Samples.load(path).metadata
            if all(made.get(name) == value for name, value in settings.items()):
                return []
        found = sample(
            self.session.model,
            self.session.tokenizer,
            text,
            self.config,
            num_tokens=self.calibration.tokens,
            window=self.calibration.window,
            seed=self.calibration.seed,
            progress=self.session.progress,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(found, metadata={**found.metadata, **settings}).save(path)
        return []

    def training(self) -> list[Row]:
        """k-means over the samples, into codebook/."""
        path = self.folder / "samples.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: run the sampling stage first (-p sampling training)")
        book = learn(
            Samples.load(path),
            self.config,
            merge=self.calibration.merge,
            seed=self.calibration.seed,
            device=self.session.device,
            progress=self.session.progress,
        )
        book.save_pretrained(self.folder / "codebook")
        return []

    def evaluation(self) -> list[Row]:
        """Perplexity under the codebook, as deployed (stream) and as MILLION reports it (distort), and the breakdown."""
        if not (self.folder / "codebook").is_dir():
            raise FileNotFoundError(f"{self.folder / 'codebook'} is not there: run sampling and training first")
        book = Codebook.from_pretrained(self.folder / "codebook")
        book.check_model(self.session.model.config)
        if (book.num_bits, book.num_subspaces) != (self.config.num_bits, self.config.num_subspaces):
            raise ValueError(
                f"the codebook in {self.folder} has M={book.num_subspaces}, nbits={book.num_bits}; expected "
                f"M={self.config.num_subspaces}, nbits={self.config.num_bits}: run training again, or use another --output"
            )
        return self._measure(CacheSpec("pq", self.config.to_dict(), book), ("stream", "distort"))

    def _sampled(self, text: str, source: str) -> dict[str, Any]:
        """What must be equal for samples to be used again."""
        return {
            "source": source,
            "source_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "asked_tokens": self.calibration.tokens,
            "asked_window": self.calibration.window,
            "seed": self.calibration.seed,
            "skipped_tokens_per_window": self.config.sink_tokens,
            "dtype": str(self.session.model.dtype).removeprefix("torch."),
        }

    def _measure(self, spec: CacheSpec, modes: Sequence[str]) -> list[Row]:
        session, task = self.session.with_cache(spec), tasks.get(self.dataset)
        options: dict[str, Any] = {"window": self.window, "stride": self.stride, "limit": self.limit}
        data_dir = self.calibration.data_dir
        rows = [task.run(session, split="test", data_dir=data_dir, mode=mode, **options) for mode in modes]
        if self.with_breakdown:
            rows += tasks.get("breakdown").run(session, tokens=self.window)
        return rows
