"""`pqcache bench`: decode attention and whole decode steps against every fp16 path, and many requests at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _bench_pipeline, _bench_serve, _options, _output
from hf_pqcache.cli.commands._groups import Group


@click.group(cls=Group)
def command() -> None:
    """Time kernels, generate or many requests at once, correctness first.

    \b
    Example:  pqcache bench kernel --json kernel.json --plot kernel.png
    """


command.add_command(_bench_serve.command, "serve")
command.add_command(_bench_pipeline.command, "pipeline")


class _KernelCase(click.ParamType):
    """batch,kv_heads,group,tokens[,head_dim[,bits or M,nbits[,value M,value nbits]]] as arguments of a benchmark's Case."""

    name = "case"
    names = ("batch", "kv_heads", "group", "tokens", "head_dim")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        words = str(value).split(",")
        if not all(word.strip().isdigit() for word in words) or len(words) not in (4, 5, 6, 7, 9):
            self.fail(
                f"{value!r}: give numbers batch,kv_heads,group,tokens[,head_dim[,bits]], or M,nbits of keys and of values in "
                "place of bits, such as 1,8,4,131072 or 1,8,4,131072,128,3",
                param,
                ctx,
            )
        numbers = list(map(int, words))
        sizes, codes = dict(zip(self.names, numbers, strict=False)), numbers[5:]
        if min(sizes.values()) < 1:
            self.fail(f"{value!r}: batch, kv_heads, group, tokens and head_dim must be at least 1", param, ctx)
        if len(codes) == 1 and codes[0] not in (0, 2, 3, 4):
            self.fail(f"{value!r}: bits are 4, 3, 2, or 0 for exact pages", param, ctx)
        if len(codes) <= 1:
            return sizes | dict(zip(["bits"], codes, strict=False))
        return {**sizes, "keys": tuple(codes[:2]), "values": tuple(codes[2:] or codes)}


class _GenerateCase(click.ParamType):
    """shape,tokens as a pair."""

    name = "case"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        shape, _, tokens = str(value).rpartition(",")
        if not shape or not tokens.strip().isdigit() or int(tokens) < 1:
            self.fail(f"{value!r}: give shape,tokens such as llama-3.1-8b,32768", param, ctx)
        return shape, int(tokens)


def _collect(
    rows: Iterable[dict[str, Any]], json_file: Path | None, show: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """All rows, shown as they come. The file holds those so far: a run that is killed keeps what it measured.

    One that Ctrl-C ends keeps it without a file, too, in a spare one of the current folder.
    """
    collected: list[dict[str, Any]] = []
    try:
        for row in rows:
            show(row)
            collected.append(row)
            if json_file not in (None, _output.STDOUT):
                _output.save_json(json_file, collected)
    except KeyboardInterrupt:
        kept = json_file
        if kept is None or kept == _output.STDOUT:
            kept = Path(f"pqcache-unfinished-{os.getpid()}.json")
            if collected:
                _output.save_json(kept, collected)
        if collected:
            rows_are = "1 row is" if len(collected) == 1 else f"{len(collected)} rows are"
            _output.note(f"{rows_are} in {kept}; give the cases that are missing as --case to go on")
        raise
    except RuntimeError as error:  # no GPU, wrong results: the machine's fault or the kernels', not the command line's
        raise click.ClickException(str(error)) from error
    return collected


def _end(rows: list[dict[str, Any]], json_file: Path | None, plot: Path | None, kind: str) -> None:
    """The document, the last line of the output; then the plot, so that no failure to draw loses what was measured."""
    if json_file in (None, _output.STDOUT):
        click.echo(json.dumps(rows))
    else:
        click.echo(f"written to {json_file}")
    if plot is not None:
        from hf_pqcache.eval.bench.plot import draw

        plot.write_bytes(draw(rows, kind))
        click.echo(f"drawn in {plot}", err=True)


@command.command()
@click.option(
    "--case",
    "cases",
    type=_KernelCase(),
    multiple=True,
    help="batch,kv_heads,group,tokens[,head_dim[,bits]], bits = 0 for exact pages; or M,nbits[,value M,value nbits] in "
    "place of bits; may be repeated.",
)
@_options.json_option("the document")
@click.option("--plot", type=_options.FILE, help="Draw the speed-ups here (PNG; needs matplotlib).")
def kernel(cases: Sequence[dict[str, Any]], json_file: Path | None, plot: Path | None) -> None:
    """Decode attention over pages, of codes or exact, against torch's fp16 attention: flash, cuDNN, memory-efficient.

    \b
    Example:  pqcache bench kernel --case 1,8,4,131072
    """
    from hf_pqcache.eval.bench import kernel

    chosen = tuple(kernel.Case(**case) for case in cases) or kernel.DEFAULT_CASES
    _end(_collect(kernel.bench_kernel(chosen), json_file), json_file, plot, "kernel")


def _show_row(row: dict[str, Any]) -> None:
    _output.say(str({k: v for k, v in row.items() if k not in ("gpu", "torch", "dtype", "copy_tb_per_s")}))


def _print_generate(rows: list[dict[str, Any]]) -> None:
    ours = {(r["shape"], r["tokens"]): r["ms_per_token"] for r in rows if r.get("cache") == "pq" and "ms_per_token" in r}
    decode = [r for r in rows if r["kind"] == "decode"]

    def figures(name: str, form: str) -> list[str]:
        return [format(r[name], form) if name in r else "" for r in decode]

    ratios = [
        r["ms_per_token"] / ours.get((r["shape"], r["tokens"]), math.nan) if "ms_per_token" in r else None for r in decode
    ]
    columns = {
        "model": [r["shape"] for r in decode],
        "tokens": [f"{r['tokens']:,}" for r in decode],
        "cache": [r["cache"] for r in decode],
        "ms/token": figures("ms_per_token", ".2f"),
        "GPU busy ms": figures("gpu_busy_ms", ".2f"),
        "floor ms": figures("floor_ms", ".2f"),
        "over ours": ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios],
        "first call s": figures("first_call_s", ".1f"),
    }
    notes = [f"{r['shape']}, {r['cache']} at {r['tokens']:,}: {r['error']}" for r in decode if "error" in r]
    for r in rows:
        if r["kind"] == "prefill":
            notes.append(
                f"prefill of {r['tokens']:,}: DynamicCache {r['dynamic_s']:.3f} s, ours {r['pq_s']:.3f} s "
                f"({r['overhead']:+.1%})"
            )
        if r["kind"] == "memory":
            notes.append(
                f"memory at {r['tokens']:,}, {r['cache']}: {_output.bytes_text(r['kept_bytes'])} kept ({r['ratio']:.3f} of "
                f"fp16), {_output.bytes_text(r['peak_bytes'])} at the peak ({r['peak_ratio']:.3f})"
            )
    _output.show_table("Decode through generate, batch 1, float16", columns, left=("cache",), notes=notes)


@command.command()
@click.option(
    "--case", "cases", type=_GenerateCase(), multiple=True, help="shape,tokens such as llama-3.1-8b,32768; may be repeated."
)
@click.option(
    "--cache",
    "caches",
    multiple=True,
    help="pq, pq-3bit, pq-2bit, pq-eager, pq-offload, paged-kv, static, dynamic, quanto, hqq, fp8; all if absent.",
)
@click.option("--new-tokens", type=click.IntRange(min=16), default=96, show_default=True)
@click.option("--no-prefill", is_flag=True, help="Skip prefill times.")
@click.option(
    "--deferred-stop",
    is_flag=True,
    help="Let generate look for its end one step late, as transformers does on MPS only: no step waits for the host.",
)
@_options.json_option("the document")
@click.option("--plot", type=_options.FILE, help="Draw ms per token here (PNG; needs matplotlib).")
def generate(
    cases: Sequence[tuple[str, int]],
    caches: Sequence[str],
    new_tokens: int,
    no_prefill: bool,
    deferred_stop: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Milliseconds per token of generate under our caches, StaticCache (compiled), DynamicCache and quantized ones.

    \b
    Example:  pqcache bench generate --case llama-3.1-8b,32768 --cache pq
    """
    from hf_pqcache.eval.bench import generate as bench

    chosen = list(cases) or bench.CASES
    if unknown := sorted({shape for shape, _ in chosen} - set(bench.SHAPES)):
        raise click.BadParameter(f"unknown shapes {unknown}; known ones are {sorted(bench.SHAPES)}", param_hint="--case")
    if unknown := sorted(set(caches) - set(bench.CACHES)):
        raise click.BadParameter(f"unknown caches {unknown}; known ones are {bench.CACHES}", param_hint="--cache")
    prefill = () if no_prefill else (8192, 32768)
    measured = bench.bench_generate(
        chosen, caches or bench.CACHES, new_tokens, prefill, note=_output.say, is_stop_deferred=deferred_stop
    )
    rows = _collect(measured, json_file, _show_row)
    _print_generate(rows)
    _end(rows, json_file, plot, "generate")
