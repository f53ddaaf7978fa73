"""`pqcache bench serve`: many requests at once, over stock, exact and coded blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _bench_replicas, _options, _output, _shapes, _types

FULL = "full"


class _Concurrency(click.ParamType):
    """8,92,full as a list of numbers of requests; None is as many as the memory holds."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int | None]:
        if isinstance(value, list):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word == FULL or (word.isdigit() and int(word)) for word in words):
            self.fail(f"{value!r}: give numbers of requests from 1, or {FULL}, like 1,92,{FULL}", param, ctx)
        return [None if word == FULL else int(word) for word in dict.fromkeys(words)]


@click.command()
@click.option("--shape", help="Random float16 weights in the shape of a known model: llama-3.1-8b, ...; needs a GPU.")
@click.option("--model", help="A folder, a Hub id or a model config, in place of --shape.")
@_options.loading_options
@click.option("--variant", "variants", type=click.Choice(_options.VARIANTS), multiple=True, help="Of blocks; all if absent.")
@click.option("--prompt-tokens", type=_types.Lengths(), default="4096", show_default=True, help="Of each prompt: 4K,32K.")
@click.option("--output-tokens", type=_types.Lengths(), default="512", show_default=True, help="Of each answer: 128,1K.")
@click.option(
    "--concurrency", type=_Concurrency(), default="92", show_default=True, help=f"In flight; {FULL} is what the memory holds."
)
@click.option("--requests", type=click.IntRange(min=1), help="Of a measurement; as many as in flight, over HTTP 64, if absent.")
@click.option(
    "--request-rate",
    "rates",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="Requests a second over HTTP, at random moments, whether the server keeps up or not; may be repeated.",
)
@click.option(
    "--replicas",
    type=_types.Lengths(),
    help="1,2: servers with so many replicas over HTTP, one after the other, under the same load; extra 'ray'.",
)
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True, help="That count, with --replicas.")
@click.option("--max-requests", type=click.IntRange(min=1), help="That a replica runs at a time, with --replicas.")
@click.option("--pin", "is_pinned", is_flag=True, help="Give each replica a core of the CPU to itself.")
@click.option("--goal-ttft-ms", type=float, default=2000, show_default=True, help="First token of a good request.")
@click.option("--goal-tpot-ms", type=float, default=50, show_default=True, help="Time between its later tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of prompts, and of moments.")
@click.option(
    "--compile", "compiles", is_flag=True, help="Let torch.compile fuse what lies between attentions in decode steps."
)
@click.option("--no-check", is_flag=True, help="Do not compare logits with a plain cache's first.")
@_options.json_option("the document; rows that are in it are not measured again")
@click.option("--force", is_flag=True, help="Measure again what is in --json.")
@click.option("--plot", type=_options.FILE, help="Draw the throughputs here (PNG; needs matplotlib).")
@_options.quiet_option()
def command(
    shape: str | None,
    model: str | None,
    variants: Sequence[str],
    prompt_tokens: list[int],
    output_tokens: list[int],
    concurrency: list[int | None],
    requests: int | None,
    rates: Sequence[float],
    replicas: list[int] | None,
    goal_ttft_ms: float,
    goal_tpot_ms: float,
    seed: int,
    compiles: bool,
    no_check: bool,
    json_file: Path | None,
    force: bool,
    plot: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Tokens a second, and times to tokens, of many requests at once: closed loop in process, or over HTTP.

    Prompts are random and all different; throughput counts generated tokens. Without --request-rate a request that ends is
    followed by the next one; with it requests come when they come, to a server in this process from a client in another.
    With --replicas clients ask servers of their own for whole answers, and what ends within --seconds counts.

    \b
    Example:  pqcache bench serve --model tiny --variant exact --variant 4 \\
              --prompt-tokens 64 --output-tokens 8 --concurrency 4 \\
              --json serve.json
    """
    if (shape is None) == (model is None):
        raise click.UsageError("give one of --shape and --model")
    loading = _options.loading_of({**options})
    for path in (json_file, plot):
        _output.check_writable(path)
    if replicas:
        sizes = prompt_tokens, output_tokens, concurrency
        _bench_replicas.run(str(model), replicas, variants, sizes, {"seed": seed, **options}, json_file)
        return
    _options.refuse_unused("without --replicas", _bench_replicas.ONLY)
    from hf_pqcache.eval.bench.load import ask
    from hf_pqcache.eval.bench.serve import Case, Goal, bench_serve

    loops: list[float | None] = [*rates] or [None]
    cases = [
        Case(variant, prompt, output, in_flight, requests, rate, seed, compiles)
        for prompt, output, rate, in_flight, variant in product(
            prompt_tokens, output_tokens, loops, concurrency, variants or _options.VARIANTS
        )
    ]
    name = shape or _shapes.public_name(str(model))
    known = [] if force else _known(json_file)
    missing = [case for case in cases if not any(_is_of(row, case, name) for row in known)]
    rows = [row for row in known if any(_is_of(row, case, name) for case in cases)]
    others = [row for row in known if row not in rows]
    note = (lambda text: None) if quiet else _output.note
    if missing:
        loaded, tokenizer = _shapes.load(shape, model, options["revision"], loading)
        goal, start = Goal(goal_ttft_ms, goal_tpot_ms), _starter(loaded, tokenizer, name)
        measured = bench_serve(loaded, name, missing, goal, start=start, ask=ask, is_checked=not no_check, note=note)
        _collect(measured, rows, others, json_file, note)
    _print(rows)
    _output.write_json(json_file, [*others, *rows])
    if plot is not None:
        _draw(rows, plot)


def _collect(
    measured: Iterable[dict[str, Any]],
    rows: list[dict[str, Any]],
    others: Sequence[dict[str, Any]],
    json_file: Path | None,
    note: Callable[[str], None],
) -> None:
    """Add rows as they come, and write all of them each time."""
    try:
        for row in measured:
            rows.append(row)
            note(_line(row))
            if json_file not in (None, _output.STDOUT):
                _output.save_json(json_file, [*others, *rows])
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error


def _draw(rows: list[dict[str, Any]], plot: Path) -> None:
    from hf_pqcache.eval.bench.plot import draw

    _output.say(_output.written(plot, _output.save_bytes(plot, draw(rows, "serve"))))


def _known(json_file: Path | None) -> list[dict[str, Any]]:
    """Rows of an earlier run; those with an error are measured again."""
    if json_file is None or json_file == _output.STDOUT or not json_file.exists():
        return []
    try:
        found = json.loads(json_file.read_text())
        return [row for row in found if "error" not in row and row["kind"] in ("closed", "open")]
    except (ValueError, TypeError, KeyError) as error:
        raise click.ClickException(f"{json_file} holds no rows of this benchmark; move it, or give another --json") from error


def _is_of(row: dict[str, Any], case: Any, name: str) -> bool:
    return row["model"] == name and all(row["asked"][field] == value for field, value in asdict(case).items())


def _starter(model: Any, tokenizer: Any, name: str) -> Callable[[Any], Any]:
    """What serves the loaded model on a free port."""

    def start(settings: Any) -> Any:
        try:
            from hf_pqcache.serve.server import Running
            from hf_pqcache.serve.service import Limits
        except ModuleNotFoundError as error:
            raise click.ClickException(f"{error.name} is not installed; type: pip install 'hf-pqcache[serve]'") from error
        return Running(lambda: (model, tokenizer), name, settings, Limits(queue=100_000)).background()

    return start


def _line(row: dict[str, Any]) -> str:
    loop = f"{row['rate']:g} requests/s" if row["rate"] else f"{row.get('in_flight', row['concurrency'] or FULL)} in flight"
    told = row.get("error") or f"{row['throughput_tok_s']:.0f} tokens/s"
    return f"{row['variant']}, {row['prompt_tokens']} + {row['output_tokens']} tokens, {loop}: {told}"


def _print(rows: Sequence[dict[str, Any]]) -> None:
    def figures(name: str, form: str = ".1f") -> list[str]:
        return [format(row[name], form) if row.get(name) is not None else "" for row in rows]

    columns = {
        "blocks": [row["variant"] for row in rows],
        "prompt": figures("prompt_tokens", ","),
        "new": figures("output_tokens", ","),
        "in flight": figures("in_flight", ","),
        "req/s": figures("rate", "g"),
        "fit": figures("requests_that_fit", ","),
        "tok/s": figures("throughput_tok_s"),
        "total tok/s": figures("total_tok_s"),
        "decode tok/s": figures("decode_tok_s"),
        "floor ms": figures("floor_ms", ".2f"),
        "good req/s": figures("goodput_req_s", ".2f"),
        **{f"{name.upper()} p{p} ms": figures(f"{name}_p{p}_ms", ".1f") for name in ("ttft", "tpot", "itl") for p in (50, 99)},
        "first s": figures("first_token_s"),
        "peak": [_output.bytes_text(row.get("peak_bytes")) for row in rows],
    }
    notes = [_line(row) for row in rows if "error" in row]
    thrown_out = [row for row in rows if row.get("begun_anew")]
    notes += [f"{row['variant']}: {row['begun_anew']} requests were thrown out and begun anew" for row in thrown_out]
    title = f"{rows[0]['model']}, {rows[0]['dtype']}" if rows else "nothing measured"
    _output.show_table(title, columns, notes=notes)
