"""`pqcache run`: MILLION's four stages in one command, with its flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_pqcache.cli.commands import _options, _output, _rows

if TYPE_CHECKING:
    from hf_pqcache.cache.footprint import MemoryPlan

#: Settings of codes, as the name of a folder of results tells them.
_CODES = {"bits": "bits", "num_subspaces": "M", "num_bits": "n", "value_subspaces": "vM", "value_bits": "vn"}


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
@click.option("-m", "--merge", is_flag=True, help="MILLION's own codes: one codebook for all layers, nothing normalised.")
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
    from hf_pqcache.cache.footprint import plan_memory
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
    folder = output or Path("runs") / _name(options, dataset, merge)
    options["results"] = options["results"] or folder / "results.jsonl"
    options["calibration"] = options["calibration"] or dataset
    chosen_stages = stages or STAGES
    _check_stages(chosen_stages, STAGES)
    task = get(dataset)
    needs_text = not {"sampling", "training"}.isdisjoint(chosen_stages)
    more = {"normalise": not merge, "learns": True, "needs_text": needs_text, "reads_data": True}
    setup = _options.setup_of(options, ["pq"], [folder, json_file], **more)
    if merge and not head_dim_of(setup.hf_config):
        raise click.UsageError("-m has one codebook for all layers, and this model's differ in head_dim: leave it out")
    chosen = check_perplexity(task, setup, window=window, stride=stride, data_dir=setup.learning.data_dir)
    shape, session = setup.specs[0].config, setup.open()
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
    if not merge:  # whose codes no cache here holds
        _output.say(
            _saved(plan_memory(session.model.config, tokens=chosen, pq_config=shape, dtype_bytes=session.model.dtype.itemsize))
        )
    _output.say(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _check_stages(chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for an unknown stage. Options of stages that are left out are none: one line serves them in turn."""
    if unknown := [stage for stage in chosen if stage not in known]:
        raise click.UsageError(f"unknown stages {unknown}; use {' '.join(known)}")


def _name(options: dict[str, Any], dataset: str, is_million: bool) -> str:
    """Of a folder of results: model, data set, and the codes as far as they were asked for."""
    model = Path(options["model_config"] or options["model"] or "").stem
    codes = [f"{letter}{options[name]}" for name, letter in _CODES.items() if options[name] is not None]
    return "-".join([model, dataset, *codes, *(["million"] if is_million else [])])


def _saved(planned: MemoryPlan) -> str:
    exact, ours = planned["dynamic"].total, planned["pq"].total
    kept = f"{_output.bytes_text(ours)} of {_output.bytes_text(exact)}"
    return f"bytes of {planned.tokens:,} tokens, everything counted: {kept}, {1 - ours / exact:.1%} saved"
