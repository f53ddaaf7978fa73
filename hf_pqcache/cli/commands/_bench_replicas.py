"""`pqcache bench serve --replicas 1,2`: what more replicas of a server gain under the same load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output

#: What is of no use there: parameter -> as the command line has it.
USELESS = {"shape": "--shape", "rates": "--request-rate", "plot": "--plot", "no_check": "--no-check", "requests": "--requests"}
#: And what is of use only there.
ONLY = {"seconds": "--seconds", "max_requests": "--max-requests", "is_pinned": "--pin"}
#: Of the seconds that count, those before them that do not.
WARM_UP = 1 / 3


def run(
    model: str,
    replicas: Sequence[int],
    variants: Sequence[str],
    sizes: tuple[Sequence[int], Sequence[int], Sequence[int | None]],
    options: Mapping[str, Any],
    json_file: Path | None,
) -> None:
    """Measure, show and write a row for each number of replicas.

    sizes: tokens of prompts and answers, requests in flight: one number each.
    options: of loading the model, which the server is given again, and `seconds`, `max_requests`, `is_pinned`, `seed`.
    """
    _options.refuse_unused("with --replicas", USELESS)
    for flag, values in zip(("--prompt-tokens", "--output-tokens", "--concurrency"), sizes, strict=True):
        if len(values) != 1 or values[0] is None:
            raise click.UsageError(f"{flag}: give one number with --replicas")
    if len(variants) > 1:
        raise click.UsageError("--variant: give one with --replicas")
    from importlib.util import find_spec

    if find_spec("ray") is None or find_spec("httpx") is None:
        raise click.ClickException("--replicas needs ray and httpx; type: pip install 'hf-pqcache[ray]' httpx")
    from hf_pqcache.eval.bench.replicas import Load, measure

    seconds, (prompt, output, in_flight) = float(options["seconds"]), (int(values[0] or 0) for values in sizes)
    load = Load(prompt, output, in_flight, seconds * WARM_UP, seconds, options["seed"])
    variant = variants[0] if variants else "4"
    words, rows = _words(model, variant, options), list[dict[str, Any]]()
    for count in replicas:
        _output.note(f"{count} replicas: {load.warm_up_s:.0f} s to warm up, then {seconds:.0f} s")
        try:
            row = measure(words, count, load)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
        told = {"kind": "replicas", "model": Path(model).name, "variant": variant, "prompt_tokens": prompt}
        rows.append({**told, "output_tokens": output, "concurrency": in_flight, **row})
        rows[-1]["times_first"] = row["throughput_tok_s"] / rows[0]["throughput_tok_s"]
    _print(rows)
    _output.write_json(json_file, rows)


def _words(model: str, variant: str, options: Mapping[str, Any]) -> list[str]:
    """What `pqcache serve` is given."""
    words = [model, "--bits", variant]
    for name in ("dtype", "device", "revision", "attn_implementation", "quantization", "max_requests"):
        if options[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(options[name])]
    words += ["--model-kwargs", json.dumps(options["model_kwargs"])] if options["model_kwargs"] else []
    words += ["--trust-remote-code"] if options["trust_remote_code"] else []
    return words + (["--pin"] if options["is_pinned"] else [])


def _print(rows: Sequence[dict[str, Any]]) -> None:
    columns = {
        "replicas": [str(row["replicas"]) for row in rows],
        "tok/s": [f"{row['throughput_tok_s']:.1f}" for row in rows],
        "times the first": [f"{row['times_first']:.2f}" for row in rows],
        "requests": [str(row["requests"]) for row in rows],
        **{f"request p{p} s": [f"{row[f'request_p{p}_s']:.1f}" for row in rows] for p in (50, 99)},
        "running, of each": [", ".join(f"{count:.1f}" for count in row["replica_running"]) for row in rows],
        "cores busy, of each": [", ".join(f"{busy:.2f}" for busy in row["replica_cores_busy"]) for row in rows],
        "of all else": [f"{row['other_cores_busy']:.2f}" for row in rows],
    }
    notes = [
        f"{row['replicas']} replicas, their clients and what lies between share {row['cores']} cores"
        for row in rows
        if row["replicas"] >= row["cores"]
    ]
    _output.show_table(f"{rows[0]['model']}, {rows[0]['concurrency']} requests in flight", columns, notes=notes)
