"""`pqcache bench pipeline`: prompts stored within steps, beside them, and on a part of the device's multiprocessors."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _shapes, _types

VARIANTS = ("baseline", "coded", "compression-only", "greenctx-only", "triad")


class _Names(click.ParamType):
    """a,b as a list; of `known` where that is given."""

    name = "names"

    def __init__(self, known: tuple[str, ...] = ()) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        found = value if isinstance(value, list) else [word.strip() for word in str(value).split(",")]
        if unknown := [name for name in found if self.known and name not in self.known]:
            self.fail(f"{', '.join(unknown)}: known are {', '.join(self.known)}", param, ctx)
        if not all(found):
            self.fail(f"{value!r}: give names with a comma between them", param, ctx)
        return list(dict.fromkeys(found))


class _Ratios(click.ParamType):
    """0.1,0.25 as a list."""

    name = "ratios"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            found = [float(word) for word in str(value).split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < ratio < 1 for ratio in found):
            self.fail(f"{value!r}: give shares of the multiprocessors between 0 and 1, like 0.125,0.25", param, ctx)
        return list(dict.fromkeys(found))


@click.command()
@click.option(
    "--models",
    type=_Names(),
    default="llama-3.1-8b",
    show_default=True,
    help="Shapes of random float16 weights, which need a GPU, folders, Hub ids or model configs.",
)
@_options.loading_options
@click.option("--workloads", type=_Names(("synthetic-long",)), default="synthetic-long", show_default=True)
@click.option("--variants", type=_Names(VARIANTS), default=",".join(VARIANTS), show_default=True)
@click.option("--synthetic-context", type=_types.Lengths(), default="1K,2K,4K", show_default=True, help="Tokens of a prompt.")
@click.option("--synthetic-output", type=_types.Length(), default="128", show_default=True, help="Tokens of an answer.")
@click.option("--synthetic-num-batches", type=click.IntRange(min=1), default=1, show_default=True, help="Of a measurement.")
@click.option("--synthetic-batch-sizes", type=_types.Lengths(), default="32,64", show_default=True, help="Requests at a time.")
@click.option(
    "--greenctx-compress-ratio", type=_Ratios(), help="Of the multiprocessors, for compression; 16 of them if absent."
)
@click.option("--greenctx-main-ratio", type=_Ratios(), help="For steps; what compression leaves if absent.")
@click.option("--greenctx-main-stream", is_flag=True, help="Keep steps to their share; else they have the whole device.")
@click.option(
    "--gpu-mem-util", type=click.FloatRange(0, 1, min_open=True), help="Of the memory beside the model, the engine's share."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of prompts.")
@click.option("--no-check", is_flag=True, help="Do not compare logits with a plain cache's first.")
@_options.json_option("the document")
@click.option("--plot", type=_options.FILE, help="Draw the throughputs here (PNG; needs matplotlib).")
@_options.quiet_option()
def command(
    models: list[str],
    workloads: list[str],
    variants: list[str],
    gpu_mem_util: float | None,
    seed: int,
    no_check: bool,
    json_file: Path | None,
    plot: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """What it gains to store prompts beside later steps: on a stream, or on a part of the device (a green context).

    baseline has exact blocks, coded has 4-bit codes; both store a prompt within its step. compression-only has codes and a
    stream, greenctx-only exact blocks and a partition, triad codes and a partition. Prompts are random and all different;
    throughput counts generated tokens. Several ratios are a sweep: each is measured.

    \b
    Example:  pqcache bench pipeline --models tiny --variants baseline,triad \\
              --synthetic-context 64 --synthetic-output 8 \\
              --synthetic-batch-sizes 4 --json pipeline.json
    """
    for path in (json_file, plot):
        _output.check_writable(path)
    from hf_pqcache.eval.bench.generate import SHAPES
    from hf_pqcache.eval.bench.pipeline import bench_pipeline, ways

    loading, revision = _options.loading_of(options), options.pop("revision")
    asked, loads = ways(variants, _partitions(options)), _loads(options)
    note = (lambda text: None) if quiet else _output.note
    rows: list[dict[str, Any]] = []
    for model in models:
        shape = model if model in SHAPES else None
        name = shape or _shapes.public_name(model)
        loaded, _ = _shapes.load(shape, model, revision, loading)
        sizes = {"memory_share": gpu_mem_util, "seed": seed, "is_checked": not no_check}
        measured = bench_pipeline(loaded, name, asked, loads, **sizes, note=note)  # type: ignore[arg-type]
        try:
            for row in measured:
                rows.append({"kind": "pipeline", "workload": workloads[0]} | row)
                note(_line(row))
                if json_file not in (None, _output.STDOUT):
                    _output.save_json(json_file, rows)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    _print(rows)
    _output.write_json(json_file, rows)
    if plot is not None:
        from hf_pqcache.eval.bench.plot import draw

        _output.say(_output.written(plot, _output.save_bytes(plot, draw(rows, "pipeline"))))


def _partitions(options: dict[str, Any]) -> list[Any]:
    """Each pair of the ratios asked for."""
    from hf_pqcache.batching import Partition

    ratios: list[list[float | None]] = [options[f"greenctx_{name}_ratio"] or [None] for name in ("compress", "main")]
    try:
        return [Partition(compress, main, options["greenctx_main_stream"]) for compress, main in product(*ratios)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _loads(options: dict[str, Any]) -> list[Any]:
    """Each prompt length with each batch size."""
    from hf_pqcache.eval.bench.pipeline import Load

    lengths, batches = options["synthetic_context"], options["synthetic_batch_sizes"]
    output, count = options["synthetic_output"], options["synthetic_num_batches"]
    return [Load(context, output, batch, count) for context, batch in product(lengths, batches)]


def _line(row: dict[str, Any]) -> str:
    told = row.get("error") or f"{row['throughput_tok_s']:.0f} tokens/s"
    return f"{row['variant']}{_parts(row)}, {row['context']} + {row['output_tokens']} tokens, batch {row['batch']}: {told}"


def _parts(row: dict[str, Any]) -> str:
    parts = row.get("sm_counts")
    return f" ({parts['compress']} of {parts['device']} SMs)" if parts else ""


def _print(rows: list[dict[str, Any]]) -> None:
    def figures(name: str, form: str = ".1f") -> list[str]:
        return [format(row[name], form) if row.get(name) is not None else "" for row in rows]

    base = {_case(row): row["throughput_tok_s"] for row in rows if row["variant"] == "baseline" and "throughput_tok_s" in row}
    against = [
        f"{row['throughput_tok_s'] / base[_case(row)] - 1:+.1%}" if _case(row) in base and "throughput_tok_s" in row else ""
        for row in rows
    ]
    beside = [f"{row['compression']['beside']} of {row['requests']}" if "compression" in row else "" for row in rows]
    columns = {
        "variant": [row["variant"] + _parts(row) for row in rows],
        "context": figures("context", ","),
        "batch": figures("batch", ","),
        "tok/s": figures("throughput_tok_s"),
        "to baseline": against,
        "total tok/s": figures("total_tok_s"),
        "decode tok/s": figures("decode_tok_s"),
        "stored beside": beside,
        **{f"{name.upper()} p{p} ms": figures(f"{name}_p{p}_ms", ".1f") for name in ("ttft", "tpot") for p in (50, 99)},
        "peak": [_output.bytes_text(row.get("peak_bytes")) for row in rows],
    }
    notes = [_line(row) for row in rows if "error" in row]
    reasons = {row["greenctx_reason"] for row in rows if row.get("partition") and not row.get("greenctx_available", True)}
    notes += [f"the device was not divided, a plain stream took its place: {why}" for why in sorted(reasons)]
    _output.show_table("prompts stored within steps and beside them", columns, left=("variant",), notes=notes)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["context"], row["batch"]
