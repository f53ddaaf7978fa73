"""`pqcache serve`: a model behind OpenAI's HTTP interface, many users at once."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from hf_pqcache.cli.commands import _options, _output, _types


@click.command()
@click.argument("model")
@click.option(
    "--bits",
    "variant",
    type=click.Choice(_options.VARIANTS),
    default="4",
    show_default=True,
    help="Of codes, for each number of the cache; or exact tokens in our blocks, or transformers' own blocks.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="PQCACHE_API_KEY", show_envvar=True, help="What clients have to send as bearer token.")
@click.option("--name", help="What clients call the model; its folder's or Hub name if absent.")
@click.option("--context", type=_types.Length(), help="Most tokens of a prompt and its answer together.")
@click.option("--cache-tokens", type=_types.Length(), help="Room of the pool: 512K; what the GPU has left, or 16K on a CPU.")
@click.option("--page-size", type=click.IntRange(16, 512), help="Tokens of a block.")
@click.option("--max-requests", type=click.IntRange(min=1), help="Most that run at a time; what the memory allows if absent.")
@click.option("--max-batch-tokens", type=click.IntRange(min=16), help="Most tokens of a step; 8192, or 512 on a CPU.")
@click.option("--max-queue", type=click.IntRange(min=1), default=1024, show_default=True, help="Most that wait or run.")
@click.option("--max-body", type=click.IntRange(min=1), default=32, show_default=True, help="MiB of one request.")
@click.option(
    "--drain-seconds", type=click.FloatRange(min=0), default=30, show_default=True, help="What running requests get at the end."
)
@click.option(
    "--no-prefix-sharing",
    is_flag=True,
    help="Compute equal beginnings of prompts each time; with sharing, later requests read their codes.",
)
@click.option("--compile", "compiles", is_flag=True, help="Faster decode steps on a GPU, for a longer start: torch.compile.")
@_options.press_option
@click.option(
    "--image-tokens",
    type=_types.Length(),
    help="Room for images of all requests, where the model takes some: 32K; 0 takes none.",
)
@click.option(
    "--compress",
    type=click.Choice(_options.COMPRESS),
    default="inline",
    show_default=True,
    help="When a finished prompt is stored: within its step, or beside others on a CUDA stream or a partition of the GPU.",
)
@click.option("--greenctx-compress-ratio", type=float, help="Of the multiprocessors, for compression; 16 of them if absent.")
@click.option("--greenctx-main-ratio", type=float, help="For steps; what compression leaves if absent.")
@click.option("--greenctx-main-stream", is_flag=True, help="Keep steps to their share; else they have the whole device.")
@click.option(
    "--prefixes",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of what equal beginnings have stored: loaded if it is there, saved at the end.",
)
@click.option(
    "--prefix-mib",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Most that is kept of prefixes at the end.",
)
@click.option(
    "--log", "is_logged", is_flag=True, help="A line of JSON for each request on the error stream, of all replicas; no prompts."
)
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, or GPUs, that share a model.")
@click.option("--pin", "is_pinned", is_flag=True, help="Give each process with the model a core of the CPU to itself; Linux.")
@click.option("--replicas", type=click.IntRange(min=1), help="Processes with the model, on Ray Serve; extra 'ray'.")
@click.option("--most-replicas", type=click.IntRange(min=1), help="As many under load; Ray adds and removes them.")
@_options.loading_options
@_options.quiet_option()
def command(
    model: str,
    variant: str,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    context: int | None,
    max_queue: int,
    max_body: int,
    drain_seconds: float,
    prefixes: Path | None,
    prefix_mib: int,
    is_logged: bool,
    tp: int,
    is_pinned: bool,
    replicas: int | None,
    most_replicas: int | None,
    revision: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve MODEL to OpenAI clients: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    MODEL is a folder, a Hub id or a model config. Requests join and leave a running batch of transformers' continuous
    batching. The first Ctrl-C or SIGTERM takes no more requests and lets running ones finish; a second one does not.

    \b
    Example:  pqcache serve tiny --port 8765

    /metrics is for Prometheus; hf_pqcache/serve/grafana.json is a dashboard of it. `pqcache doctor --serve` looks whether all
    is there.

    --press prunes each prompt; equal beginnings are not shared then. Where the GPU cannot be divided, or there is none,
    --compress takes the simpler way, and the line that says it is ready tells why.

    A model of LLaVA's kind takes images in chats, as data: URLs (image_url parts); nothing is fetched.

    With --tp several processes share the model, each some of its heads, on a GPU of its own. If one of them ends, so does the
    server.

    With --replicas requests that begin alike go to the same one, which may be several processes. A replica that dies is
    started anew; requests of which it had sent nothing are asked again elsewhere, streams end with an error. One that Ray takes
    away hands its prefixes to those that get its requests. RAY_ADDRESS names a cluster to join.

    --prefixes lets a restarted server, and whoever goes on with a conversation tomorrow, begin where the last one ended, as
    codes. The file tells what was asked. One of another model or other settings is refused.

    \b
    Example:  pqcache serve tiny --press snapkv:0.5 --port 8765
              pqcache serve tiny --tp 2 --port 8765
              pqcache serve tiny --replicas 2 --tp 2 --port 8765
              pqcache serve tiny --prefixes tiny.prefixes

    \b
    Then:     curl -s localhost:8765/v1/completions \\
                -d '{"prompt": "The owl is", "max_tokens": 16}'
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise click.UsageError("serve starts the processes that share the model itself: leave out torchrun, and give --tp")
    loading = _options.loading_of(options)
    from hf_pqcache.eval.session.model_config import load_model_config
    from hf_pqcache.eval.session.models import check_device, load_model, public_name

    described = load_model_config(model, {"revision": revision})
    check_device(loading["device"])
    _check_installed()
    from hf_pqcache.serve import log
    from hf_pqcache.serve.server import Running
    from hf_pqcache.serve.service import Limits

    if is_logged:
        log.start()
    note = (lambda text: None) if quiet else _output.note
    _check_processes(tp, loading, options, is_here=not (replicas or most_replicas))
    load = partial(load_model, described.source, revision=described.revision, is_parallel=tp > 1, **loading)
    load = _pinned(load, loading["device"]) if is_pinned else load
    limits = Limits(context, max_queue, max_body * 2**20, drain_seconds, prefix_mib * 2**20)
    what = load, name or public_name(model), _sizes(variant, tp, options), limits
    _check_prefixes(prefixes, what[2], bool(replicas or most_replicas))
    if replicas or most_replicas:
        fleet = _fleet(replicas or 1, most_replicas, tp, loading["device"], is_logged)
        _serve_replicas(what, host, port, api_key, fleet)
        return

    def tell(service: Any) -> None:
        note(_ready(service, running.url))

    running = Running(*what, host=host, port=port, api_key=api_key, prefixes=prefixes, when_ready=tell)
    note(f"loading {running.service.name}; {running.url}/health says when it is ready")
    _run(running, tp)


def _run(running: Any, tp: int) -> None:
    """Serve until the end, which does not wait for other processes that share the model."""
    from hf_pqcache.serve.group import LostError

    try:
        running.run()
    except LostError as error:
        click.echo(f"Error: {error}", err=True)
        _leave(1)
    if tp > 1:
        _leave(0)


def _check_installed() -> None:
    """Raises ClickException without the extra, ImportError without what transformers has to offer."""
    try:
        import_module("hf_pqcache.serve.server")
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed; type: pip install 'hf-pqcache[serve]'") from error
    from hf_pqcache.serve.manager import check

    check()


def _sizes(variant: str, tp: int, options: dict[str, Any]) -> Any:
    """The engine's settings. Raises ValueError and UsageError for those that do not go together."""
    from hf_pqcache.compressors.parse import parse
    from hf_pqcache.serve.manager import EngineSettings

    shares_prefixes, partition = not options.pop("no_prefix_sharing"), _partition(options)
    sizes = EngineSettings(variant, shares_prefixes=shares_prefixes, partition=partition, processes=tp, **options)
    if sizes.press is not None:
        parse(sizes.press)
    return sizes


def _leave(code: int) -> NoReturn:
    """End though a thread may wait for the other processes without end, or NCCL for captured graphs with its collectives."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_processes(tp: int, loading: dict[str, Any], options: dict[str, Any], *, is_here: bool) -> None:
    """Raises UsageError for what several processes that share the model cannot do; is_here: whether on this machine."""
    if tp == 1:
        return
    import torch

    if loading["device"] not in (None, "cpu") or "device_map" in loading:
        raise click.UsageError("--tp spreads the model over the first GPUs itself: leave out --device and --device-map")
    if options["press"] is not None:
        raise click.UsageError("--press sees the heads of one process only: leave out --tp, or the press")
    if loading["device"] == "cpu" and torch.cuda.is_available():
        raise click.UsageError("--tp takes GPUs where there are some: hide them by CUDA_VISIBLE_DEVICES= instead")
    if is_here and torch.cuda.is_available() and torch.cuda.device_count() < tp:
        raise click.UsageError(f"--tp {tp}: this machine has {torch.cuda.device_count()} GPUs")


def _pinned(load: Any, device: str | None) -> Any:
    """A way to load a model that gives its process a core. Raises UsageError where that cannot be, or helps nobody."""
    import torch

    if not hasattr(os, "sched_setaffinity"):
        raise click.UsageError("--pin needs Linux, which can keep a process on a core: leave it out")
    if device != "cpu" and torch.cuda.is_available():
        raise click.UsageError("--pin is for models on a CPU: leave it out, or give --device cpu")
    from hf_pqcache.serve.cores import pinned

    return partial(pinned, load)


def _check_prefixes(path: Path | None, sizes: Any, are_replicas: bool) -> None:
    """Raises UsageError where there are no prefixes to be kept in a file."""
    why = None
    if are_replicas:
        why = "replicas hand theirs over to each other; leave out one of --prefixes and --replicas"
    elif sizes.variant == "stock":
        why = "stock blocks are transformers' own, which it lets nobody have; take other --bits"
    elif sizes.processes > 1:
        why = "each of the processes that share a model holds its own heads; leave out one of --prefixes and --tp"
    elif sizes.press is not None or not sizes.shares_prefixes:
        why = f"nothing is shared with {'--no-prefix-sharing' if sizes.press is None else '--press'}; leave out one of them"
    if path is not None and why is not None:
        raise click.UsageError(f"--prefixes {path}: {why}")


#: By the lane that prompts take.
_STORED = {"inline": "within steps", "stream": "on a stream", "partition": "on a partition"}


def _partition(options: dict[str, Any]) -> Any:
    """How --compress partition divides the device; its options are taken out of `options`."""
    flags = {
        name: f"--{name.replace('_', '-')}"
        for name in ("greenctx_compress_ratio", "greenctx_main_ratio", "greenctx_main_stream")
    }
    given = [options.pop(name) for name in flags]
    if options["compress"] != "partition":
        _options.refuse_unused("without --compress partition", flags)
        return None
    from hf_pqcache.batching import Partition

    try:
        return Partition(*given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _ready(service: Any, url: str) -> str:
    engine, kind = service.engine, service.engine.settings.told
    facts = engine.facts()
    if engine.settings.compress != "inline":
        why = f" ({facts['compress_because']})" if facts["compress_because"] else ""
        kind += f", prompts stored {_STORED[facts['compress']]}{why}"
    told = f"{service.context:,} tokens a request, {service.engine.most_requests} requests at a time"
    loaded = engine.state().get("imported_tokens")
    return f"ready: {service.name} on {url}, {kind}, {told}" + (f", {loaded:,} tokens of prefixes" if loaded else "")


def _fleet(replicas: int, most: int | None, tp: int, device: str | None, is_logged: bool) -> dict[str, Any]:
    """What `replicas.Fleet` takes."""
    import torch

    gpus = float(tp) if device != "cpu" and torch.cuda.is_available() else 0.0
    return {"replicas": replicas, "most": most, "gpus": gpus, "cpus": float(tp), "is_logged": is_logged}


def _serve_replicas(what: tuple[Any, ...], host: str, port: int, api_key: str | None, fleet: dict[str, Any]) -> None:
    try:
        from hf_pqcache.serve import replicas
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed; type: pip install 'hf-pqcache[ray]'") from error

    def tell(url: str) -> None:
        count = f"{fleet['replicas']} replicas, on Ray {replicas.ray.__version__}"
        _output.note(f"ready: {what[1]} on {url}, {what[2].told}, {count}")

    made = replicas.Fleet(**fleet)
    try:
        replicas.run(replicas.application(*what, fleet=made, api_key=api_key), host, port, made, tell)
    except replicas.StartError as error:
        raise click.ClickException(str(error)) from error
