"""LongBench's nine metrics as one evaluate.Metric; its configuration names the metric."""

from typing import Any

import datasets
import evaluate

from hf_pqcache.eval.measure.longbench_scores import METRICS, score

_NAMES = [name.removesuffix("_score") for name in METRICS]


class LongBench(evaluate.Metric):
    """Mean over examples of the best score over each one's right answers, in percent."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _NAMES:
            raise ValueError(f"LongBench has no metric {self.config_name!r}; load it with one of {_NAMES}")
        features = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description="Scores of LongBench (Bai et al. 2023), 0 to 100.",
            citation="Bai et al. 2023, LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding",
            inputs_description="predictions: texts. references: all right answers of each. all_classes: for classification.",
            features=datasets.Features(features),
        )

    def _compute(  # type: ignore[override]
        self, predictions: list[str], references: list[list[str]], all_classes: list[str] | None = None
    ) -> dict[str, Any]:
        pairs = zip(predictions, references, strict=True)
        scores = [score(f"{self.config_name}_score", text, answers, all_classes) for text, answers in pairs]
        return {self.config_name: 100 * sum(scores) / len(scores)}
