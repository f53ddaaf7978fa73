"""The options that commands share, what they are parsed to, and the session that they open; prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_pqcache.cli.commands import _output, _rows, _types, _unfinished

if TYPE_CHECKING:
    from hf_pqcache.eval.session.setup import Setup

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
DTYPES = ("auto", "float32", "float16", "bfloat16")
#: Names of `hf_pqcache.eval.session.models.QUANTIZATIONS`.
QUANTIZATIONS = ("bnb-4bit", "bnb-8bit", "hqq-4bit", "hqq-8bit", "quanto-int4", "quanto-int8", "torchao-int8")
#: Of `hf_pqcache.serve.manager`: what blocks of many requests hold.
VARIANTS = ("4", "3", "2", "exact", "stock")
#: Of `hf_pqcache.batching.streams`: when finished prompts are stored.
COMPRESS = ("inline", "stream", "partition")


def _json_to(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    ctx.meta[_output.JSON_TO_OUTPUT] = value == _output.STDOUT
    return value


def _hush(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value:
        from hf_pqcache.cli.commands._progress import no_bars

        ctx.find_root().with_resource(no_bars())
    return value


def json_option(what: str) -> Decorator:
    """--json FILE as `json_file`; "-" is the output, and what is said for people then goes to the error stream."""
    return click.option(
        "--json", "json_file", type=FILE, callback=_json_to, help=f"Write {what} as JSON here; - is the output."
    )


def quiet_option() -> Decorator:
    return click.option("--quiet", is_flag=True, callback=_hush, help="No progress bars and no warnings, of any library.")


LOADING = (
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of the model's numbers."),
    click.option("--device", type=_types.Device(), help="cpu, cuda, cuda:1, auto; the GPU if there is one."),
    click.option("--device-map", help="Spread the weights over devices: auto, balanced, sequential, or JSON."),
    click.option("--revision", help="Commit, branch or tag of the model; the model config's if absent."),
    click.option("--attn-implementation", help="sdpa, eager, flash_attention_2, ...; transformers' choice if absent."),
    click.option(
        "--quantization",
        type=click.Choice(QUANTIZATIONS),
        metavar="KIND",
        help=f"Quantize the weights as they are loaded: {', '.join(QUANTIZATIONS)}.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model."),
    click.option("--model-kwargs", type=_types.Settings(), help="More arguments of from_pretrained: name=value,... or JSON."),
)
_MODEL = (
    click.option("-f", "--config", "model_config", help="A model config: its name, or a YAML file."),
    click.option("--model", help="A folder or Hub id, with -f in place of the config's own; or what -f takes."),
    *LOADING,
)
_CALIBRATION = (
    click.option("--calibration", help="Text to learn a codebook of the model's own from: a file, demo, or task/split."),
    click.option("--calibration-tokens", type=click.IntRange(min=1), help="Tokens to sample of it."),
    click.option("--data-dir", type=FOLDER, help="Folder with the data sets' plain files, instead of the Hub."),
)
_CODES = (
    click.option("--bits", type=click.IntRange(2, 4), help="Of codes, for each number; the model config's, or 4, if absent."),
    click.option("-M", "--num-subspaces", "num_subspaces", type=int, help="Codes of a key, and of a value."),
    click.option("--nbits", "--num-bits", "num_bits", type=click.IntRange(4, 8), help="Bits of one of these codes."),
    click.option("--value-subspaces", type=int, help="Codes of a value; as -M if absent."),
    click.option("--value-nbits", "value_bits", type=click.IntRange(4, 8), help="Bits of one of these; as --nbits if absent."),
)
_WINDOW = (
    click.option("--page-size", type=int, help="Tokens of a page."),
    click.option("--extended-residual", type=int, help="Newest tokens that stay exact."),
)
_SINKS = click.option("--sink-tokens", type=int, help="First tokens that stay exact.")
_POOL = click.option("--max-pages", type=int, help="Most pages that a cache may take.")
SHAPE = (*_CODES, *_WINDOW, _SINKS, _POOL)
_RESULTS = (
    click.option("--results", type=FILE, help="JSONL file of result rows; what is in it is not measured again."),
    click.option("--force", is_flag=True, help="Measure again what is in --results."),
    json_option("the rows"),
    click.option("--seed", type=click.IntRange(min=0), help="Of all that is drawn; 0 if absent."),
    quiet_option(),
)
_CODEBOOK = click.option("--codebook", help="Of the model's own: folder or Hub repository; the package's if absent.")
press_option = click.option(
    "--press", help="What prunes prompts before they are stored, and by how much: snapkv:0.5 (`pqcache list presses`)."
)
_CACHE = (
    click.option(
        "--cache",
        default="pq",
        show_default=True,
        help="dynamic, static, quanto[:4|2], hqq[:8|4|3|2|1], fp8, pq[:4|3|2], paged-kv, kivi[:4|3|2], "
        "turboquant[:4|3.5|3|2.5|2], kvquant[:4|3|2], int4-token; the number is bits a value (`pqcache list caches`).",
    ),
    press_option,
    _CODEBOOK,
)


def apply(options: Sequence[Decorator], function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def apply_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a cache's shape."""
    return apply(SHAPE, function)


def session_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All options of `setup_of`."""
    return apply((*_MODEL, *_CACHE, *SHAPE, *_CALIBRATION, *_RESULTS), function)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same without the choice of a cache."""
    return apply((*_MODEL, *SHAPE, *_CALIBRATION, *_RESULTS), function)


def loading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How a model is loaded, alone: what `loading_of` takes."""
    return apply(LOADING, function)


def only_model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which model, and how it is loaded; see `open_model`."""
    return apply(_MODEL, function)


def calibrate_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Those that shape a codebook, or that it can recommend."""
    return apply((*_MODEL, *_CODES, *_WINDOW, _SINKS, *_CALIBRATION, *_RESULTS), function)


def tune_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Those that a search leaves as they are."""
    return apply((*_MODEL, _SINKS, _POOL, *_CALIBRATION, *_RESULTS), function)


def sweep_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Those that a sweep over codes and windows leaves as they are."""
    return apply(
        (*_MODEL, click.option("--page-size", type=int, help="Tokens of a page."), _SINKS, _POOL, *_CALIBRATION, *_RESULTS),
        function,
    )


def loading_of(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_model` but the name and revision, from the values of LOADING, which are taken out of `options`."""
    found = {name: options.pop(name) for name in ("dtype", "device", "attn_implementation", "quantization")}
    found |= {"trust_remote_code": options.pop("trust_remote_code"), "model_kwargs": options.pop("model_kwargs") or {}}
    device_map = options.pop("device_map")
    if device_map is not None and found["device"] is not None:
        raise click.UsageError("--device and --device-map both say where the model goes; give one of the two")
    if device_map is not None:
        found["device_map"] = _types.Settings().convert(device_map, None, None) if "{" in device_map else device_map
    return found


def setup_of(
    options: dict[str, Any],
    caches: Sequence[str],
    outputs: Sequence[Path | None] = (),
    *,
    reads_data: bool = False,
    **more: Any,
) -> Setup:
    """What is known before a model is loaded, from the values of `session_options`, which are taken out of `options`.

    outputs: files and folders that will be written: whether they can be is found out now. reads_data: whether the command
    reads a data set beside the text to calibrate on. more: of `prepare`.
    """
    codes = ("bits", "num_subspaces", "num_bits", "value_subspaces", "value_bits")
    shape = ("page_size", "max_pages", "extended_residual", "sink_tokens", "calibration_tokens")
    overrides = {name: options.pop(name, None) for name in (*codes, *shape, "revision")}
    name, model = options.pop("model_config"), options.pop("model")
    if name is None and model is None:
        raise click.UsageError("which model? Give -f with a model config, or --model with a folder or a Hub id")
    if options["force"] and options["results"] is None:
        raise click.UsageError("--force measures again what is in --results: give that, or leave --force out")
    loading, is_quiet = loading_of(options), options.pop("quiet")
    for path in (*outputs, options["results"]):
        _output.check_writable(path)
    from hf_pqcache.eval.session.setup import prepare

    unfinished = _unfinished.begin(options["results"])
    setup = prepare(
        name or model,
        caches,
        overrides={**overrides, "model": model if name else None},
        codebook=options.pop("codebook", None),
        calibration=options.pop("calibration"),
        data_dir=options.pop("data_dir"),
        reads_data=reads_data,
        results=options.pop("results"),
        force=options.pop("force"),
        progress=not is_quiet,
        seed=options.pop("seed"),
        rows_file=unfinished.path,
        show=None if is_quiet else _rows.show,
        **loading,
        **more,
    )
    unfinished.begin(setup.results)
    return setup


def open_model(options: dict[str, Any], *, data_dir: Path | None, is_quiet: bool) -> Any:
    """A session of the model that `only_model_options` name, which are taken out of `options`."""
    name, model, revision = (options.pop(key) for key in ("model_config", "model", "revision"))
    if name is None and model is None:
        raise click.UsageError("which model? Give -f with a model config, or --model with a folder or a Hub id")
    from hf_pqcache.eval.session.setup import prepare

    overrides = {"revision": revision, "model": model if name else None}
    return prepare(name or model, overrides=overrides, data_dir=data_dir, progress=not is_quiet, **loading_of(options)).open()


def cache_of(options: dict[str, Any]) -> str:
    """Cache and press as one name, "pq:4+snapkv:0.5"; both are taken out of `options`."""
    cache, press = options.pop("cache"), options.pop("press")
    return cache if press is None else f"{cache}+{press}"


def was_given(name: str) -> bool:
    """Whether the command line has an option, its default aside."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT)


def refuse_unused(when: str, names: Mapping[str, str]) -> None:
    """Raise UsageError for an option (parameter: as the command line has it) that was given and does nothing `when`."""
    for name, flag in names.items():
        if was_given(name):
            raise click.UsageError(f"{flag} does nothing {when}: leave it out")


def lengths_option(default: str) -> Decorator:
    """--lengths 1K,2K,4K as a list of ints, None where the model decides."""
    return click.option(
        "--lengths", type=_types.Lengths(), help=f"Tokens, 512,1K,32K; if absent, of {default} what the model holds."
    )


def text_option(what: str) -> Decorator:
    return click.option("--text", default="demo", show_default=True, help=f"{what}: a file, demo, or task/split.")


def texts_option(what: str) -> Decorator:
    """The same several times, as `texts`."""
    return click.option(
        "--text",
        "texts",
        multiple=True,
        default=("demo",),
        show_default=True,
        help=f"{what}: a file, demo, or task/split; may be given several times.",
    )
