"""What the evaluation commands share: their options, how they end, and the tables that they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from hf_pqcache.eval.results import Row

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)
#: Dashes and underscores in option names are the same.
CONTEXT = {"token_normalize_func": lambda name: name.replace("_", "-")}
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_MODEL = (
    click.option("-f", "--config", "model_config", help="A model config: its name, or a YAML file."),
    click.option("--model", help="A folder or Hub id, with -f in place of the config's own; or what -f takes."),
    click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", show_default=True),
    click.option("--device", default=None, help="cpu, cuda, cuda:1, auto; the GPU if there is one."),
)
_CALIBRATION = (
    click.option("--calibration", help="Text to calibrate on: a file, demo, or task/split. The model config's if absent."),
    click.option("--calibration-tokens", type=click.IntRange(min=1), help="Tokens to sample."),
    click.option("--data-dir", type=FOLDER, help="Folder with the data sets' plain files, instead of the Hub."),
)
_SHAPE = (
    click.option("-M", "--num-subspaces", "num_subspaces", type=int, help="Subspaces of a head vector."),
    click.option("--nbits", "--num-bits", "num_bits", type=click.IntRange(4, 8), help="Bits of a code."),
    click.option("--page-size", type=int, help="Tokens of a page."),
    click.option("--max-pages", type=int, help="Pages of the pool."),
    click.option("--extended-residual", type=int, help="Newest tokens that stay exact."),
    click.option("--sink-tokens", type=int, help="First tokens that stay exact."),
)
_RESULTS = (
    click.option("--results", type=FILE, help="JSONL file of result rows; what is in it is not measured again."),
    click.option("--force", is_flag=True, help="Measure again what is in --results."),
    click.option("--json", "json_file", type=FILE, help="Also write the rows here."),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--quiet", is_flag=True, help="No progress bars."),
)
_CACHE = (
    click.option(
        "--cache",
        default="pq",
        show_default=True,
        help="dynamic, static, quanto[:4|2], hqq[:8|4|3|2|1], fp8, pq[:4|3|2], paged-kv; the number is bits a value.",
    ),
    click.option("--codebook", help="Folder or Hub repository; without one a pq cache is calibrated."),
)


def _apply(options: Sequence[Decorator], function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def session_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All options of `session_of`."""
    return _apply((*_MODEL, *_CACHE, *_SHAPE, *_CALIBRATION, *_RESULTS), function)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same without the choice of a cache."""
    return _apply((*_MODEL, *_SHAPE, *_CALIBRATION, *_RESULTS), function)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """What a user can mend ends as one line and a non-zero exit."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def session_of(options: dict[str, Any], **more: Any) -> tuple[Any, Any, Any]:
    """(session, model config, calibration) from the values of `session_options`, which are taken out of `options`."""
    from hf_pqcache.eval.setup import open_session

    shape = ("num_subspaces", "num_bits", "page_size", "max_pages", "extended_residual", "sink_tokens", "calibration_tokens")
    overrides = {name: options.pop(name) for name in shape}
    name, model = options.pop("model_config"), options.pop("model")
    if name is None and model is None:
        raise click.UsageError("which model? Give -f with a model config, or --model with a folder or a Hub id.")
    if options["quiet"]:
        from transformers.utils import logging

        logging.disable_progress_bar()
    return open_session(
        name or model,
        options.pop("cache", "dynamic"),
        overrides={**overrides, "model": model if name else None},
        codebook=options.pop("codebook", None),
        calibration=options.pop("calibration"),
        data_dir=options.pop("data_dir"),
        dtype=options.pop("dtype"),
        device=options.pop("device"),
        results=options.pop("results"),
        force=options.pop("force"),
        progress=not options.pop("quiet"),
        seed=options.pop("seed"),
        **more,
    )


def lengths_option(default: str) -> Decorator:
    """--lengths 1K,2K,4K as a list of ints."""

    def parse(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
        try:
            return [int(x[:-1]) * 1024 if x[-1:] in "kK" else int(x) for x in value.replace(" ", "").split(",") if x]
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: give lengths like 512,1K,32K") from error

    return click.option("--lengths", default=default, show_default=True, callback=parse, help="Tokens, e.g. 512,1K,32K.")


def finish(rows: Sequence[Row], json_file: Path | None, title: str) -> None:
    """Print the rows as a table, and write them as JSON; of several processes the main one does."""
    from rich.table import Table

    from hf_pqcache.eval.distributed import is_main
    from hf_pqcache.eval.naming import UNREAD, labels, settings_text

    if not is_main():
        return
    shared, names = _common([row.settings for row in rows]), labels(rows)
    caches = {key: name.partition(",")[0] for key, name in names.items()}
    columns = {
        "task": [row.task for row in rows],
        "metric": [row.metric for row in rows],
        "value": [_value(row) for row in rows],
        "unit": [row.unit for row in rows],
        "cache": [caches[row.key] if len(set(caches.values())) > 1 else "" for row in rows],
        "bits": ["" if row.true_bits is None else f"{row.true_bits:.2f}" for row in rows],
        "settings": [settings_text({k: v for k, v in row.settings.items() if k not in {*shared, *UNREAD}}) for row in rows],
    }
    columns = {heading: texts for heading, texts in columns.items() if any(texts)}
    table = Table(title=title)
    for heading in columns:
        justify: Any = "right" if heading in ("value", "bits") else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading not in ("task", "settings"))
    for texts in zip(*columns.values(), strict=True):
        table.add_row(*texts)
    console = new_console()
    console.print(table)
    if told := settings_text({k: v for k, v in shared.items() if k not in UNREAD}):
        console.print(told, style="dim", markup=False)
    if json_file is not None:
        write_json(json_file, {"rows": [row.to_dict() for row in rows]})


def new_console() -> Console:
    """For tables: as wide as the terminal, and 120 columns in a file or a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def _value(row: Row) -> str:
    return f"{row.value:,.0f}" if row.unit == "bytes" else f"{row.value:,.4g}" if row.unit else f"{row.value:.4f}"


def _common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings in which all rows that have them agree, where several rows are shown."""
    merged = {name: value for one in settings for name, value in one.items()}
    return {name: value for name, value in merged.items() if all(one.get(name, value) == value for one in settings)}


def save_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Save, and say where."""
    save_json(path, document)
    click.echo(f"written to {path}")
