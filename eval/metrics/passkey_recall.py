"""Pass-key recall as an evaluate.Metric: does an answer begin with its key?"""

from typing import Any

import datasets
import evaluate


class PasskeyRecall(evaluate.Metric):
    """Share of answers that begin, after white space, with the key asked for."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pass-key recall.",
            citation="",
            inputs_description="predictions: generated answers. references: keys.",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:  # type: ignore[override]
        found = [text.strip().startswith(key) for text, key in zip(predictions, references, strict=True)]
        return {"recall": sum(found) / len(found)}
