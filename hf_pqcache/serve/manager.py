"""Makes transformers' manager of continuous batching as a server needs it, and says what it needs of this release.

`missing_parts` says which private parts are not as expected that this file, the engine and the sampler touch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from hf_pqcache.config import PQConfig
from hf_pqcache.models.images import image_token

#: What blocks hold: codes of so many bits; tokens as they are, in blocks of ours or in transformers' own.
VARIANTS = ("4", "3", "2", "exact", "stock")
#: What is not left to transformers on a CPU.
CPU_SIZES: dict[str, Any] = {"cache_tokens": 16384, "max_batch_tokens": 512, "max_requests": 64}
#: Of images that are remembered at a time, if nobody says how many: LLaVA-1.5 makes 576 of one.
IMAGE_TOKENS = 32768
#: Signatures that the sampler and this file rely on, in module `transformers.generation.continuous_batching`.
SIGNATURES = {
    "continuous_api.ContinuousBatchingManager.add_request": {"input_ids", "request_id", "max_new_tokens", "streaming"}
    | {"record_timestamps", "eos_token_id", "logit_processor_kwargs"},
    "continuous_api.ContinuousBatchingManager.register_result_handler": {"request_id", "callback"},
    "continuous_api.ContinuousBatchingManager._handle_critical_error": {"error", "batch_processor"},
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.check_kwargs": {"kwargs"},
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.fill_defaults": {"int32_tensor"},
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.prepare_tensor_args": {"requests_in_batch", "arg_storage"},
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList.__call__": {"input_ids", "scores", "logits_processor_args"},
    "cache.PagedAttentionCache.search_prefix_match": {"request_id", "prompt_ids"},
    "cache.PagedAttentionCache.can_store_request_tokens": {"state", "request_len", "dry_run"},
    "continuous_api.ContinuousMixin.init_continuous_batching": {
        "generation_config",
        "continuous_batching_config",
        "workload_hints",
    },
    "utils.WorkloadHints": {"max_prompt_length", "max_generated_length", "num_requests"},
    "requests.RequestState.__init__": {"initial_tokens", "position_offset", "_true_initial_tokens", "logit_processor_kwargs"},
}


def missing_parts() -> list[str]:
    """What this release of transformers lacks of the parts that the server needs; none if it can run."""
    from importlib import import_module

    found = []
    for path, names in SIGNATURES.items():
        module, *attributes = path.split(".")
        try:
            part: Any = import_module(f"transformers.generation.continuous_batching.{module}")
            for attribute in attributes:
                part = getattr(part, attribute)
            if missing := names - set(inspect.signature(part).parameters):
                found.append(f"{path} has no {', '.join(sorted(missing))}")
        except (ImportError, AttributeError):
            found.append(path)
    return found


def check() -> None:
    """Raises ImportError where transformers is too old, or has changed a part that the server needs."""
    from hf_pqcache.batching import support

    if why := support.why_unsupported():
        raise ImportError(why)
    if missing := missing_parts():
        raise ImportError(
            f"continuous batching of this release of transformers lacks {missing[0]}; 5.20 to 5.24 have what serve needs"
        )


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of the engine; None leaves one to transformers.

    Attributes:
        variant: of VARIANTS.
        cache_tokens: room of the pool. page_size: tokens of a block. max_requests: most that run at a time.
        context, longest_prompt: most tokens of a request, and of them of its prompt, where the workload is known.
        max_batch_tokens: most tokens of a step. shares_prefixes: whether equal beginnings are stored once.
        processes: that share the model, each some of its heads (tensor parallelism).
        compiles: whether torch.compile fuses what lies between attentions of decode steps.
        compress, partition, press: of `enable_batching`; the press by name.
        image_tokens: of images that are remembered at a time, for a model that takes some; 0 takes none.
        memory_share: of what the device has free, the most that the engine takes.

    Raises ValueError for what transformers' own blocks cannot do.
    """

    variant: str = "4"
    cache_tokens: int | None = None
    page_size: int | None = None
    max_requests: int | None = None
    max_batch_tokens: int | None = None
    shares_prefixes: bool = True
    context: int | None = None
    longest_prompt: int | None = None
    compress: str = "inline"
    partition: Any = None
    press: str | None = None
    image_tokens: int | None = None
    processes: int = 1
    memory_share: float | None = None
    compiles: bool = False

    def __post_init__(self) -> None:
        only_ours = {"press": self.press is not None, "compress": self.compress != "inline", "image_tokens": self.image_tokens}
        if self.variant == "stock" and (asked := [name for name, value in only_ours.items() if value]):
            raise ValueError(f"{asked[0]}= is for blocks of ours, and stock blocks are transformers' own; take another variant")

    @property
    def told(self) -> str:
        """What requests are kept as, in words."""
        kind = f"{self.variant} bits" if self.variant.isdigit() else f"{self.variant} blocks"
        kind += "" if self.press is None else f", press {self.press}"
        return kind if self.processes == 1 else f"{kind}, {self.processes} processes share the model"


def image_room(model: Any, settings: EngineSettings) -> tuple[int | None, str]:
    """(tokens of images that the engine has room for, why it takes none)."""
    from hf_pqcache.batching.images import why_unfit

    if image_token(model.config) is None:
        return None, "this model takes no images"
    if why := why_unfit(model):
        return None, why
    if settings.processes > 1:
        return None, "images are looked at by one process, and several share the model here (--tp)"
    if settings.variant == "stock" or settings.image_tokens == 0:
        return None, "images are turned off (--bits stock, or --image-tokens 0)"
    return settings.image_tokens or IMAGE_TOKENS, ""


def make_manager(model: Any, settings: EngineSettings) -> Any:
    """A `ContinuousBatchingManager` of transformers that has not started, greedy.

    Raises ImportError where transformers has not the parts that the server needs, and what `enable_batching` raises.
    """
    check()
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    from hf_pqcache.batching import disable_batching, enable_batching

    if model.device.type == "cpu":  # its memory is everybody's, and masks of a step take batch x pool
        given = {name: getattr(settings, name) or size for name, size in CPU_SIZES.items()}
        given["cache_tokens"] = settings.cache_tokens or max(CPU_SIZES["cache_tokens"], settings.context or 0)
        settings = replace(settings, **given)
    if settings.variant == "stock":
        page_size = settings.page_size or ContinuousBatchingConfig().page_size
        disable_batching(model)
    else:
        page_size = settings.page_size or PQConfig().page_size
        kept: dict[str, Any] = {"exact": True} if settings.variant == "exact" else {"bits": int(settings.variant)}
        kept |= {"compress": settings.compress, "partition": settings.partition, "press": settings.press}
        kept |= {"images": image_room(model, settings)[0]}
        # A bound alone is not what requests are like: room is not shared out by it.
        is_known = settings.longest_prompt is not None
        enable_batching(model, **kept, page_size=page_size, max_length=settings.context if is_known else None)
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=None if settings.cache_tokens is None else -(-settings.cache_tokens // page_size),
        max_requests_per_batch=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
        max_memory_percent=settings.memory_share,
        allow_block_sharing=settings.shares_prefixes,
        default_compile_level=int(settings.compiles),
    )
    hints = None
    if settings.longest_prompt is not None and settings.context is not None:
        hints = WorkloadHints(settings.longest_prompt, settings.context - settings.longest_prompt, settings.max_requests or 0)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    return model.init_continuous_batching(greedy, config, hints)


def requests_that_fit(manager: Any, context: int) -> int:
    """How many requests of `context` tokens the pool of a warmed-up manager holds at a time."""
    cache, config = manager.batch_processor.cache, manager.continuous_batching_config
    most: int = config.max_requests_per_batch  # of ours, what windows and blocks have been made for
    return most if hasattr(cache, "why_unfit") else max(1, min(most, cache.num_blocks // -(-context // config.page_size)))
