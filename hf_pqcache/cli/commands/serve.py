"""`pqcache serve`: a model behind OpenAI's HTTP interface, many users at once."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

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
    "--log", "is_logged", is_flag=True, help="A line of JSON for each request on the error stream, of all replicas; no prompts."
)
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
    is_logged: bool,
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

    With --replicas requests that begin alike go to the same one. A replica that dies is started anew; requests of which it
    had sent nothing are asked again elsewhere, streams end with an error. RAY_ADDRESS names a cluster to join.

    \b
    Example:  pqcache serve tiny --replicas 2 --press snapkv:0.5

    --press prunes each prompt; equal beginnings are not shared then. Where the GPU cannot be divided, or there is none,
    --compress takes the simpler way, and the line that says it is ready tells why.

    \b
    Then:     curl -s localhost:8765/v1/completions \\
                -d '{"prompt": "The owl is", "max_tokens": 16}'
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise click.UsageError("serve runs in one process: start one for each GPU, without torchrun, and spread requests")
    loading = _options.loading_of(options)
    from hf_pqcache.eval.session.model_config import load_model_config
    from hf_pqcache.eval.session.models import check_device, load_model, public_name

    described = load_model_config(model, {"revision": revision})
    check_device(loading["device"])
    try:
        from hf_pqcache.compressors.parse import parse
        from hf_pqcache.serve import log
        from hf_pqcache.serve.engine import EngineSettings, check
        from hf_pqcache.serve.server import Running
        from hf_pqcache.serve.service import Limits
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed; type: pip install 'hf-pqcache[serve]'") from error

    check()
    if is_logged:
        log.start()
    note = (lambda text: None) if quiet else _output.note
    load = partial(load_model, described.source, revision=described.revision, **loading)
    partition = _partition(options)
    sizes = EngineSettings(variant, shares_prefixes=not options.pop("no_prefix_sharing"), partition=partition, **options)
    if sizes.press is not None:
        parse(sizes.press)
    limits = Limits(context, max_queue, max_body * 2**20, drain_seconds)
    what = load, name or public_name(model), sizes, limits
    if replicas or most_replicas:
        _serve_replicas(what, host, port, api_key, (replicas or 1, most_replicas), loading["device"], is_logged)
        return
    running = Running(
        *what, host=host, port=port, api_key=api_key, when_ready=lambda service: note(_ready(service, running.url))
    )
    note(f"loading {running.service.name}; {running.url}/health says when it is ready")
    running.run()


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
    return f"ready: {service.name} on {url}, {kind}, {told}"


def _serve_replicas(
    what: tuple[Any, ...],
    host: str,
    port: int,
    api_key: str | None,
    count: tuple[int, int | None],
    device: str,
    is_logged: bool,
) -> None:
    import torch

    try:
        from hf_pqcache.serve import replicas
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed; type: pip install 'hf-pqcache[ray]'") from error
    gpus = 1.0 if device != "cpu" and torch.cuda.is_available() else 0.0
    fleet = replicas.Fleet(*count, gpus=gpus, is_logged=is_logged)

    def tell(url: str) -> None:
        _output.note(f"ready: {what[1]} on {url}, {what[2].told}, {count[0]} replicas, on Ray {replicas.ray.__version__}")

    replicas.run(replicas.application(*what, fleet=fleet, api_key=api_key), host, port, fleet, tell)
