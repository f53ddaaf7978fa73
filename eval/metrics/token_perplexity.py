"""Perplexity from losses that were measured elsewhere, as an evaluate.Metric: it runs no model."""

import math
from typing import Any

import datasets
import evaluate


class TokenPerplexity(evaluate.Metric):
    """exp of the mean negative log-likelihood over all tokens of all windows."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Perplexity of a text in windows.",
            citation="",
            inputs_description="predictions: summed negative log-likelihood of a window, nats. references: its scored tokens.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:  # type: ignore[override]
        return {"perplexity": math.exp(math.fsum(predictions) / sum(references))}
