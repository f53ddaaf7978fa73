"""Lets a model's own continuous batching run over blocks of ours, and back."""

from __future__ import annotations

from typing import Any

import torch

from hf_pqcache import arguments
from hf_pqcache.batching import images as vision
from hf_pqcache.batching import support
from hf_pqcache.batching.lanes import Lane
from hf_pqcache.batching.streams import COMPRESS, Partition
from hf_pqcache.codebook import shipped
from hf_pqcache.codebook.asked import check_asked
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.compressors.model import prepared
from hf_pqcache.compressors.press import Press
from hf_pqcache.config import PQConfig
from hf_pqcache.models.shapes import kv_shape, layer_configs


def enable_batching(
    model: Any,
    bits: int | None = None,
    *,
    codebook: Codebook | None = None,
    pq_config: PQConfig | None = None,
    exact: bool = False,
    max_length: int | None = None,
    compress: str | Lane = "inline",
    partition: Partition | None = None,
    press: Press | str | None = None,
    images: int | None = None,
    **overrides: Any,
) -> Any:
    """Let transformers' continuous batching keep this model's keys and values as codes.

    From now on `model.generate_batch`, `model.init_continuous_batching`, `model.continuous_batching_context_manager` and a
    server on them run over coded blocks; `generate` is as it was. `disable_batching` gives the engine its own blocks again.

    Args:
        model: a causal language model whose layers all have full attention, such as Llama, Qwen or Mistral.
        bits: the operating point, 4, 3 or 2; 4 by default.
        codebook: one of the model's own; None takes the shipped one.
        pq_config, **overrides: settings as of `PagedPQCache`.
        exact: keep exact tokens in blocks (`PagedKVCache`'s kind): the baseline to compare with.
        max_length: tokens that one request may have, prompt and new ones. None takes what the workload says, else the model's
            max_position_embeddings. Requests that are longer than there is room for fail at once with PQC001, others go on.
        compress: when a finished prompt is stored. "inline": within its step. "stream": while other requests go on, on a CUDA
            stream of its own; "partition": on one that has some of the multiprocessors to itself. Or a lane, see `lanes.py`.
            What cannot be had is done in the simpler way, and the manager's `stats()["compression"]` says why.
        partition: how "partition" divides the device; None gives compression 16 multiprocessors.
        press: prunes each prompt before it is stored: "snapkv:0.5", or an object with `compress`, as `pressed` takes them; one
            that keeps as many tokens of all layers. Prefixes are not shared then, and steps not compiled.
        images: room for tokens of images, for a model of LLaVA's kind; see `image_prompt`. Several times what requests under
            way show at a time: an image that comes again while it is remembered is not looked at again.

    Returns:
        The model.

    On a GPU decode steps are CUDA graphs, and the next step is prepared meanwhile; `default_compile_level=1` of the
    ContinuousBatchingConfig has torch.compile fuse what lies between attentions besides, for half a minute of compilation.
    Pool and windows are sized by `ContinuousBatchingConfig`: num_blocks (of page_size tokens), max_requests_per_batch (each has
    a window), max_memory_percent, max_batch_tokens. A prompt of several steps waits exactly until its end has come, so that
    chunks do not change results; one that is longer than a share of memory allows is stored meanwhile, see "cut_prompts" in
    `stats`. A prompt that shares a prefix attends to the prefix's codes, as a later turn in `generate` does;
    `allow_block_sharing=False` turns that off. The manager's `export_prefixes(prompts)` and `import_prefixes(data)` take what
    is shared to another engine, or to a file and back.

    Raises ImportError where transformers' engine is too old or has changed, ValueError for a model that does not fit.
    """
    if why := support.why_unsupported():
        raise ImportError(why)
    from transformers import ContinuousBatchingConfig

    from hf_pqcache.batching.manager import BlocksManager  # inherits from what has just been checked

    arguments.check_codebook(codebook)
    arguments.check_pq_config(pq_config)
    base = support.base_of(model)
    if not hasattr(base, "init_continuous_batching"):
        raise TypeError(f"{type(model).__name__} has no continuous batching: pass a causal language model of transformers")
    if why := support.why_unfit(base):
        raise ValueError(f"{why}; use generate with PagedPQCache, which keeps what it cannot compress as it is")
    if isinstance(compress, str) and compress not in COMPRESS:
        raise ValueError(f"compress={compress!r} is unknown; use one of {COMPRESS}")
    if partition is not None and compress != "partition":
        raise ValueError(f"partition= divides the device for compress='partition', and compress={compress!r} was asked for")
    if press is not None:
        prepared(press, base)
    settings, book = _stored(base, bits, codebook, pq_config, exact, overrides)
    disable_batching(base)
    if images is not None:
        vision.begin(base, images)

    @torch.no_grad()
    def init_continuous_batching(
        generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        cached = getattr(base, "_cached_continuous_batching_manager", None)
        if isinstance(cached, BlocksManager):
            cached.switch_to_cb_friendly_attn(base)
            return cached
        generation_config = base.generation_config if generation_config is None else generation_config
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1
        asked = continuous_batching_config or ContinuousBatchingConfig()
        return BlocksManager(
            settings, book, max_length, compress, partition, press, base, generation_config, asked, workload_hints
        )

    init_continuous_batching.__doc__ = type(base).init_continuous_batching.__doc__
    base.init_continuous_batching = init_continuous_batching
    return model


def _stored(
    base: Any, bits: int | None, codebook: Codebook | None, pq_config: PQConfig | None, exact: bool, overrides: dict[str, Any]
) -> tuple[PQConfig, Codebook | None]:
    """What blocks hold: settings, and the codebook of codes."""
    if exact:
        if codebook is not None or bits is not None:
            raise ValueError("exact=True keeps tokens as they are: pass no bits= and no codebook=")
        settings, book = PQConfig(sink_tokens=0, extended_residual=1).replace(**overrides), None
    else:
        overrides |= {} if bits is None else {"bits": bits}
        settings = (pq_config or PQConfig()).replace(**overrides)
        head_dim = kv_shape(layer_configs(base.config.get_text_config())[0])[1]
        assert head_dim is not None  # why_unfit has seen it
        if codebook is not None:
            codebook.check_model(base.config)
            check_asked(codebook, base.config, settings, overrides.keys())
        book = codebook or shipped.codebook(settings, head_dim, head_dim)
    return settings, book


def disable_batching(model: Any) -> None:
    """Let transformers' continuous batching have its own blocks again; without `enable_batching` before, nothing happens."""
    base = support.base_of(model)
    vision.end(base)
    if "init_continuous_batching" in vars(base):
        base.destroy_cached_continuous_batching_manager()
        del base.init_continuous_batching


def is_enabled(model: Any) -> bool:
    base = support.base_of(model)
    return "init_continuous_batching" in vars(base)
