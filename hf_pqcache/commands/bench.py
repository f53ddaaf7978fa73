"""`pqcache bench`: decode attention and whole decode steps against every fp16 path, on this machine's GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from hf_pqcache.commands._options import FILE, new_console, save_json


@click.group()
def command() -> None:
    """Time kernels or generate on a GPU, physical ceiling first.

    Example:  pqcache bench kernel --json kernel.json --plot kernel.png
    """


def _collect(
    rows: Iterable[dict[str, Any]], json_file: Path | None, show: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """All rows, shown as they come. The file holds those so far: a run that is killed keeps what it measured."""
    collected = []
    try:
        for row in rows:
            show(row)
            collected.append(row)
            if json_file is not None:
                save_json(json_file, collected)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    return collected


def _end(rows: list[dict[str, Any]], json_file: Path | None, plot: Path | None, kind: str) -> None:
    """The document, the last line of the output; then the plot, so that no failure to draw loses what was measured."""
    click.echo(json.dumps(rows) if json_file is None else f"written to {json_file}")
    if plot is not None:
        from hf_pqcache.eval.bench_plot import draw

        try:
            plot.write_bytes(draw(rows, kind))
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"drawn in {plot}", err=True)


@command.command()
@click.option(
    "--case",
    "cases",
    multiple=True,
    help="batch,kv_heads,group,tokens[,head_dim,M,bits], M = bits = 0 for exact pages; may be repeated.",
)
@click.option("--json", "json_file", type=FILE, help="Write the JSON document here instead of to the output.")
@click.option("--plot", type=FILE, help="Draw the speed-ups here (PNG; needs matplotlib).")
def kernel(cases: Sequence[str], json_file: Path | None, plot: Path | None) -> None:
    """Decode attention over pages, of codes or exact, against torch's fp16 attention: flash, cuDNN, memory-efficient.

    Example:  pqcache bench kernel --case 1,8,4,131072
    """
    from hf_pqcache.eval import bench_kernel

    chosen = bench_kernel.DEFAULT_CASES
    if cases:
        names = ("batch", "kv_heads", "group", "tokens", "head_dim", "num_subspaces", "num_bits")
        try:
            chosen = tuple(bench_kernel.Case(**dict(zip(names, map(int, c.split(",")), strict=False))) for c in cases)
        except (TypeError, ValueError) as error:
            raise click.BadParameter(f"expected numbers {','.join(names)}: {error}", param_hint="--case") from error
    _end(_collect(bench_kernel.bench_kernel(chosen), json_file), json_file, plot, "kernel")


def _show_row(row: dict[str, Any]) -> None:
    click.echo({k: v for k, v in row.items() if k not in ("gpu", "torch", "dtype", "copy_tb_per_s")})


def _print_generate(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    console = new_console()
    table = Table(title="Decode through generate, batch 1, float16")
    for heading in ("model", "tokens", "cache", "ms/token", "GPU busy ms", "floor ms", "slower than ours", "first call s"):
        table.add_column(heading, justify="left" if heading in ("model", "cache") else "right")
    ours = {(r["shape"], r["tokens"]): r["ms_per_token"] for r in rows if r.get("cache") == "pq" and "ms_per_token" in r}
    for r in (r for r in rows if r["kind"] == "decode"):
        if "error" in r:
            table.add_row(r["shape"], f"{r['tokens']:,}", r["cache"], r["error"], "", f"{r['floor_ms']:.2f}", "", "")
            continue
        ratio = r["ms_per_token"] / ours.get((r["shape"], r["tokens"]), float("nan"))
        table.add_row(
            r["shape"],
            f"{r['tokens']:,}",
            r["cache"],
            f"{r['ms_per_token']:.2f}",
            f"{r['gpu_busy_ms']:.2f}",
            f"{r['floor_ms']:.2f}",
            f"{ratio:.2f}x",
            f"{r['first_call_s']:.1f}",
        )
    console.print(table)
    for r in rows:
        if r["kind"] == "prefill":
            console.print(
                f"prefill of {r['tokens']:,}: DynamicCache {r['dynamic_s']:.3f} s, ours {r['pq_s']:.3f} s "
                f"({r['overhead']:+.1%})"
            )
        if r["kind"] == "memory":
            console.print(
                f"memory at {r['tokens']:,}, {r['cache']}: {r['kept_bytes']:,} bytes kept ({r['ratio']:.3f} of fp16), "
                f"{r['peak_bytes']:,} at the peak ({r['peak_ratio']:.3f})"
            )


@command.command()
@click.option("--case", "cases", multiple=True, help="shape,tokens such as llama-3.1-8b,32768; may be repeated.")
@click.option(
    "--cache",
    "caches",
    multiple=True,
    help="pq, pq-2bit, pq-eager, pq-offload, paged-kv, static, dynamic, quanto, hqq, fp8; all if absent.",
)
@click.option("--new-tokens", type=click.IntRange(min=16), default=96, show_default=True)
@click.option("--no-prefill", is_flag=True, help="Skip prefill times.")
@click.option(
    "--deferred-stop",
    is_flag=True,
    help="Let generate look for its end one step late, as transformers does on MPS only: no step waits for the host.",
)
@click.option("--json", "json_file", type=FILE, help="Write the JSON document here instead of to the output.")
@click.option("--plot", type=FILE, help="Draw ms per token here (PNG; needs matplotlib).")
def generate(
    cases: Sequence[str],
    caches: Sequence[str],
    new_tokens: int,
    no_prefill: bool,
    deferred_stop: bool,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Milliseconds per token of generate under our caches, StaticCache (compiled), DynamicCache and quantized ones.

    Example:  pqcache bench generate --case llama-3.1-8b,32768 --cache pq --cache static
    """
    from hf_pqcache.eval import bench_generate as bench

    chosen = [(shape, int(tokens)) for shape, tokens in (case.rsplit(",", 1) for case in cases)] or bench.CASES
    if unknown := sorted({shape for shape, _ in chosen} - set(bench.SHAPES)):
        raise click.BadParameter(f"unknown shapes {unknown}; known ones are {sorted(bench.SHAPES)}", param_hint="--case")
    if unknown := sorted(set(caches) - set(bench.CACHES)):
        raise click.BadParameter(f"unknown caches {unknown}; known ones are {bench.CACHES}", param_hint="--cache")
    prefill = () if no_prefill else (8192, 32768)
    measured = bench.bench_generate(
        chosen, caches or bench.CACHES, new_tokens, prefill, note=click.echo, is_stop_deferred=deferred_stop
    )
    rows = _collect(measured, json_file, _show_row)
    _print_generate(rows)
    _end(rows, json_file, plot, "generate")
