"""Reproduces the accuracy figures: perplexity of a model whose cache is compressed at 4, 3 and 2 bits a value.

    python -m hf_pqcache.eval.accuracy_study --model FOLDER --calibration FILE --text FILE [--windows N] [--json FILE]

Codebooks are calibrated on one text and evaluated on another, for the tail-aware and the plain k-means objective. Text
files may be .xz. Prints one table; its conditions stand above it and, with --json, in the file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pqcache.codebook.calibrate import calibrate
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.codebook.kmeans import Objective
from hf_pqcache.config import PQConfig
from hf_pqcache.eval.measure.perplexity import Mode, perplexity
from hf_pqcache.eval.session import caches
from hf_pqcache.eval.session.texts import read_text


@dataclass(frozen=True)
class Setting:
    """A compression to measure: numbers of head_dim in a subspace, bits of a code, and the loss it may cost."""

    name: str
    subspace_width: int
    num_bits: int
    target_percent: float


#: At head_dim 128: M=64 n=8, M=64 n=6, M=32 n=8.
SETTINGS = (Setting("4 bits", 2, 8, 0.35), Setting("3 bits", 2, 6, 1.0), Setting("2 bits", 4, 8, 4.0))


def bits_per_value(config: PQConfig, codebook: Codebook, num_tokens: int, element_bits: int = 16) -> dict[str, float]:
    """True bits for each key or value number of one sequence of `num_tokens` tokens, by where they lie.

    codes, window, table, total: see `cache_bits`. codebook: float16 centroids, which all sequences share; charged to one
    here. with_codebook: total and the codebook.
    """
    shapes = [(layer.keys.shape[0], *layer.head_dims) for layer in codebook.layers.values()]
    fitted = config.replace(num_subspaces=codebook.num_subspaces, num_bits=codebook.num_bits)
    parts = cache_bits(fitted, shapes, num_tokens, element_bits)
    parts["codebook"] = 8 * codebook.nbytes / (num_tokens * sum(heads * (dk + dv) for heads, dk, dv in shapes))
    parts["with_codebook"] = parts["total"] + parts["codebook"]
    return parts


def cache_bits(
    config: PQConfig, shapes: Sequence[tuple[int, int, int]], num_tokens: int, element_bits: int = 16
) -> dict[str, float]:
    """True bits for each key or value number, known before anything is calibrated.

    codes: of the coded tokens. window: exact tokens (their slots are allocated in full). table: one 32-bit page number
    for every page, shared by all layers. total: their sum.

    Args:
        shapes: (KV heads, numbers in a key, numbers in a value) of every compressed layer.
    """
    values = sum(heads * (dk + dv) for heads, dk, dv in shapes) * num_tokens
    coded = config.coded_tokens(num_tokens)
    code_bits = sum(heads * 2 * config.subspaces(dk) * config.num_bits * coded for heads, dk, _ in shapes)
    parts = {
        "codes": code_bits / values,
        "window": element_bits * (config.sink_tokens + config.window_slots) / num_tokens,
        "table": 32 * (coded // config.page_size) / values,
    }
    parts["total"] = sum(parts.values())
    return parts


def study(
    model: Any,
    tokenizer: Any,
    calibration: str,
    text: str,
    *,
    window: int = 4096,
    max_windows: int | None = 12,
    num_tokens: int = 65536,
    seed: int = 0,
    objectives: tuple[Objective, ...] = ("tail", "plain"),
    modes: tuple[Mode, ...] = ("stream", "distort"),
    settings: tuple[Setting, ...] = SETTINGS,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure every setting -> {"exact": ..., "rows": [...], "conditions": {...}}, all JSON values."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    common: dict[str, Any] = {"window": window, "max_windows": max_windows, "progress": progress}
    exact = perplexity(model, tokenizer, ids, **common)
    head_dim = caches.head_dim(model)
    rows = []
    for setting in settings:
        config = PQConfig(num_subspaces=head_dim // setting.subspace_width, num_bits=setting.num_bits)
        for objective in objectives:
            start = time.perf_counter()
            codebook = calibrate(
                model,
                tokenizer,
                calibration,
                config,
                num_tokens=num_tokens,
                window=window,
                seed=seed,
                objective=objective,
                progress=progress,
            )
            row: dict[str, Any] = {
                "setting": setting.name,
                "num_subspaces": config.num_subspaces,
                "num_bits": config.num_bits,
                "objective": objective,
                "target_percent": setting.target_percent,
                "calibration_s": round(time.perf_counter() - start, 2),
                "bits_per_value": bits_per_value(config, codebook, window),
                "codebook_bytes": codebook.nbytes,
                "codebook_fingerprint": codebook.fingerprint,
                "calibration": codebook.metadata,
            }
            for mode in modes:
                result = perplexity(model, tokenizer, ids, mode=mode, codebook=codebook, config=config, **common)
                row[mode] = {"perplexity": result.value, "change_percent": 100 * (result.value / exact.value - 1)}
            rows.append(row)
    device = next(model.parameters()).device
    return {
        "task": "accuracy_study",
        "version": 1,
        "exact": exact.to_dict(),
        "rows": rows,
        "conditions": {
            "model": rows[0]["calibration"]["model"] if rows else None,
            "dtype": str(next(model.parameters()).dtype),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cache": PQConfig().to_dict(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result of `study` as a Markdown table."""
    exact, cache = result["exact"], result["conditions"]["cache"]
    lines = [
        f"{result['conditions']['model']}, {exact['windows']} windows of {exact['window']} tokens, "
        f"{cache['sink_tokens']} sinks, {cache['extended_residual']} recent, pages of {cache['page_size']}; exact "
        f"perplexity {exact['value']:.4f} over {exact['tokens']} tokens",
        "",
        "| setting | M | n | objective | stream | change | target | distort | bits: codes | + window, table "
        "| + codebook | codebook |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        bits, stream, distort = row["bits_per_value"], row.get("stream"), row.get("distort")
        lines.append(
            f"| {row['setting']} | {row['num_subspaces']} | {row['num_bits']} | {row['objective']} "
            f"| {_cell(stream, 'perplexity', '.4f')} | {_cell(stream, 'change_percent', '+.2f')} % "
            f"| {row['target_percent']:+.2f} % | {_cell(distort, 'change_percent', '+.2f')} % | {bits['codes']:.2f} "
            f"| {bits['total']:.2f} | {bits['with_codebook']:.2f} | {row['codebook_bytes'] / 2**20:.2f} MiB |"
        )
    return "\n".join(lines)


def _cell(figures: dict[str, float] | None, name: str, form: str) -> str:
    return "-" if figures is None else format(figures[name], form)


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(
        description="Perplexity under a compressed cache at 4, 3 and 2 bits a value.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--calibration", required=True, type=Path, help="text the codebooks are learnt from")
    parser.add_argument("--text", required=True, type=Path, help="text that is evaluated")
    parser.add_argument("--windows", type=int, default=12, help="how many windows of the text")
    parser.add_argument("--window", type=int, default=4096, help="tokens of a window; at most the training length")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    args = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    result = study(
        model.to(args.device),
        AutoTokenizer.from_pretrained(args.model),
        read_text(args.calibration),
        read_text(args.text),
        window=args.window,
        max_windows=args.windows,
        num_tokens=args.tokens,
        seed=args.seed,
    )
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
