"""`pqcache sweep`: codes x windows x tasks, one table and one picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _types


@click.command()
@_options.sweep_options
@click.option("--bits", type=_types.Numbers(int, 2, 4), help="Operating points; 4,3,2 if nothing else is varied.")
@click.option("-M", "--num-subspaces", type=_types.Numbers(int, 8, 1024), help="Codes of a key, and of a value.")
@click.option("--nbits", "--num-bits", "num_bits", type=_types.Numbers(int, 4, 8), help="Bits of one of them.")
@click.option("--value-subspaces", type=_types.Numbers(int, 8, 1024), help="Codes of a value; as of its key if absent.")
@click.option("--value-nbits", "value_bits", type=_types.Numbers(int, 4, 8), help="Bits of one of them; the same.")
@click.option(
    "--extended-residual",
    "windows",
    type=_types.Numbers(int, 1, 1 << 20),
    default="128",
    show_default=True,
    help="Recent tokens.",
)
@click.option(
    "--tasks",
    "names",
    type=_types.Words(),
    default="demo,recall",
    show_default=True,
    help="Texts (demo, a file, task/split), recall, longbench/..., ruler/..., harness/...",
)
@click.option("--tokens", type=_types.Length(), help="Of recall, and of the bytes; 2048, or what the model holds, if absent.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens of a perplexity window; as --tokens if absent.")
@click.option("--limit", type=click.IntRange(min=1), default=4, show_default=True, help="Windows and examples of each task.")
@click.option("--recall-count", type=click.IntRange(min=1), default=20, show_default=True, help="Pass keys to ask for.")
@click.option("--plot", type=_options.FILE, help="Draw the picture here (PNG; needs matplotlib).")
def command(
    bits: list[int] | None,
    num_subspaces: list[int] | None,
    num_bits: list[int] | None,
    value_subspaces: list[int] | None,
    value_bits: list[int] | None,
    windows: list[int],
    names: list[str],
    tokens: int | None,
    window: int | None,
    limit: int,
    recall_count: int,
    plot: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Measure every shape of a cache on every task: change against the exact cache, and bytes saved.

    \b
    Example:  pqcache sweep --model tiny -M 16,8 --nbits 4 --tasks demo,recall \\
              --tokens 512 --limit 1 --recall-count 2 --plot sweep.png
    """
    from hf_pqcache.eval.search.sweep import grid, picture, sweep, table
    from hf_pqcache.eval.search.sweep_tasks import is_text, prepare_runs, reads_data_set
    from hf_pqcache.eval.session.caches import head_dim_of

    data_dir = options["data_dir"]
    if "recall" not in names:
        _options.refuse_unused("without the task recall", {"recall_count": "--recall-count"})
    if not any(is_text(name) for name in names):
        _options.refuse_unused("without a text among the tasks", {"window": "--window"})
    setup = _options.setup_of(options, ["pq"], [json_file, plot], reads_data=any(reads_data_set(name) for name in names))
    varied = {"bits": bits, "num_subspaces": num_subspaces, "num_bits": num_bits}
    varied |= {"value_subspaces": value_subspaces, "value_bits": value_bits}
    codes = {name: values for name, values in varied.items() if values is not None}
    configs = grid(setup.config.pq_config, head_dim_of(setup.hf_config), windows, codes)
    runs, length = prepare_runs(
        setup, names, tokens=tokens, window=window, limit=limit, recall_count=recall_count, data_dir=data_dir
    )
    session = setup.open()
    found = sweep(session, lambda spec: setup.ready(session, spec), configs, runs, length)
    title = f"{session.model_name}: {len(configs)} shapes, bytes of {length:,} tokens"
    _output.show_table(title, table(found), notes=["change: of a perplexity relative, of a score its difference, to exact"])
    if plot is not None:
        drawn = picture(found, title, f"{session.device_name}, {session.model.dtype}")
        _output.say(_output.written(plot, _output.save_bytes(plot, drawn)))
    lines = [{**asdict(line), "cache": line.label} for line in found.lines]
    _output.write_json(json_file, {"lines": lines, "rows": [row.to_dict() for row in found.rows]})
