"""`pqcache run`: MILLION's four stages in one command, with its flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _rows


class _SeveralWords(click.Command):
    """Lets -p take several words, as argparse's nargs="+" does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        is_list = False
        for word in args:
            if word in ("-p", "--phases", "--stages"):
                is_list = True
                continue
            is_list = is_list and not word.startswith("-")
            spread += ["-p", word] if is_list else [word]
        return super().parse_args(ctx, spread)


@click.command(cls=_SeveralWords)
@_options.model_options
@click.option("--dataset", default="wikitext-2-raw-v1", show_default=True, help="Task whose text is evaluated.")
@click.option("-p", "stages", multiple=True, help="Stages: baseline sampling training evaluation; all if absent.")
@click.option("-m", "--merge", is_flag=True, help="One codebook for all layers and heads, as MILLION has it; less accurate.")
@click.option("--half", is_flag=True, help="Run the model in float16.")
@click.option("--paged/--no-paged", default=True, help="As MILLION has it; the cache is always paged, --no-paged is refused.")
@click.option("--keep-samples", is_flag=True, help="Leave the sampled keys and values on disk: gigabytes for a large model.")
@click.option("--breakdown", is_flag=True, help="Also measure the stages of a decode step.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens of a perplexity window; the model config's if absent.")
@click.option("--stride", type=click.IntRange(min=1), help="The next window starts so many tokens later.")
@click.option("--limit", type=click.IntRange(min=1), help="Windows to measure; all if absent.")
@click.option("-o", "--output", type=_options.NEW_FOLDER, help="Folder for samples, codebook, results.")
def command(
    stages: tuple[str, ...],
    dataset: str,
    merge: bool,
    half: bool,
    paged: bool,
    keep_samples: bool,
    breakdown: bool,
    window: int | None,
    stride: int | None,
    limit: int | None,
    output: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Baseline, sampling, training and evaluation of a codebook for one model.

    \b
    Example:  pqcache run -f tiny --data-dir data --calibration demo -M 32 \\
              --nbits 4 -m --half --paged --page_size 64 --extended_residual 128 \\
              --limit 1 --breakdown -p baseline sampling training evaluation
    """
    from hf_pqcache.eval.pipeline import STAGES, Pipeline
    from hf_pqcache.eval.session.caches import head_dim_of
    from hf_pqcache.eval.tasks import get
    from hf_pqcache.eval.tasks._text import check_perplexity

    if not paged:
        raise click.UsageError("--no-paged: this cache has no other form; leave it out")
    if half and options["dtype"] not in ("auto", "float16"):
        raise click.UsageError(f"--half is float16 and --dtype says {options['dtype']}; give one of the two")
    if half:
        options["dtype"] = "float16"
    model = options["model_config"] or options["model"] or ""
    name = f"{Path(model).stem}-{dataset}-M{options['num_subspaces'] or 'half'}-n{options['num_bits'] or 8}"
    folder = output or Path("runs") / (name + ("-merged" if merge else ""))
    options["results"] = options["results"] or folder / "results.jsonl"
    options["calibration"] = options["calibration"] or dataset
    chosen_stages = stages or STAGES
    _check_stages(chosen_stages, STAGES)
    task = get(dataset)
    needs_text = not {"sampling", "training"}.isdisjoint(chosen_stages)
    setup = _options.setup_of(
        options, ["pq"], [folder, json_file], merge=merge, learns=True, needs_text=needs_text, reads_data=True
    )
    chosen = check_perplexity(task, setup, window=window, stride=stride, data_dir=setup.learning.data_dir)
    shape = setup.config.pq_config
    shape = shape.replace(num_subspaces=shape.subspaces(head_dim_of(setup.hf_config)))
    session = setup.open()
    pipeline = Pipeline(
        session,
        shape,
        setup.learning,
        dataset,
        folder,
        window=chosen,
        stride=stride,
        limit=limit,
        with_breakdown=breakdown,
        keep_samples=keep_samples,
    )
    rows = pipeline.run(chosen_stages)
    _rows.finish(rows, json_file, f"{session.model_name} on {dataset}")
    _tell_savings(session.model, chosen, shape)
    _output.say(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _check_stages(chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for an unknown stage. Options of stages that are left out are none: one line serves them in turn."""
    if unknown := [stage for stage in chosen if stage not in known]:
        raise click.UsageError(f"unknown stages {unknown}; use {' '.join(known)}")


def _tell_savings(model: Any, tokens: int, shape: Any) -> None:
    from hf_pqcache.cache.footprint import plan_memory

    planned = plan_memory(model.config, tokens=tokens, pq_config=shape, dtype_bytes=model.dtype.itemsize)
    saved = planned.saved("pq") / planned["dynamic"].total
    kept = _output.bytes_text(planned["pq"].total), _output.bytes_text(planned["dynamic"].total)
    _output.say(f"bytes of {tokens:,} tokens, codebook included: {kept[0]} of {kept[1]}, {saved:.1%} saved")
