"""transformers' manager of continuous batching, with our cache and schedulers in place of its own.

The only file that touches what `continuous_api.py` keeps to itself (transformers 5.20 to 5.24); `support.py` checks its
signatures before.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
from transformers import AttentionInterface, CompileConfig, ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api

from hf_pqcache.batching import function, sizes, streams
from hf_pqcache.batching import images as vision
from hf_pqcache.batching.blocks import SlotCache
from hf_pqcache.batching.lanes import Lane
from hf_pqcache.batching.portable import Portable
from hf_pqcache.batching.pruning import Pruning
from hf_pqcache.batching.schedulers import SCHEDULERS
from hf_pqcache.batching.slots import SlotLayers
from hf_pqcache.batching.streams import Partition
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.compressors.press import Press
from hf_pqcache.config import PQConfig
from hf_pqcache.models.shapes import kv_shape, layer_configs

logger = logging.getLogger(__name__)

_SWAPPING = threading.Lock()


def _compiled(level: int) -> CompileConfig | None:
    """What transformers compiles decode steps by at a default_compile_level."""
    if level <= 0:
        return None
    mode = "max-autotune-no-cudagraphs" if level >= 2 else "default"
    return CompileConfig(mode=mode, fullgraph=False, dynamic=level <= 2)


def _compiled_once(step: Any) -> Any:
    """A compiled step whose layers share their code: their numbers, which the cache is told, are no constants of it."""

    @functools.wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            return step(*args, **kwargs)

    return run


class BlocksManager(Portable, continuous_api.ContinuousBatchingManager):
    """transformers' manager over blocks of ours; `enable_batching` lets the model make them.

    Args:
        settings, book: of the pages; no book keeps exact tokens.
        max_length: most tokens of one request; None is what the workload or the model says.
        compress, partition: as `streams.make` takes them.
        press: that prunes prompts, by name or itself.
        model, generation_config, continuous_batching_config, workload_hints: as transformers has them.
    """

    def __init__(
        self,
        settings: PQConfig,
        book: Codebook | None,
        max_length: int | None,
        compress: str | Lane,
        partition: Partition | None,
        press: Press | str | None,
        model: Any,
        generation_config: Any,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: Any = None,
    ) -> None:
        self._settings, self._book = settings, book
        self._compress, self._partition, self._press = compress, partition, press
        self._pruning: Pruning | None = None
        asked = continuous_batching_config
        config = copy.deepcopy(asked)
        config.page_size = settings.page_size
        # What transformers resolves for flash attention only, and would warn of.
        config.max_blocks_per_request = config.varlen_compile_config = config.decode_compile_config = None
        config.use_cuda_graph, config.default_compile_level = False, 0
        if config.cpu_offload_space:
            logger.warning("cpu_offload_space=%s has no effect: windows do not move to the host", config.cpu_offload_space)
            config.cpu_offload_space = 0.0
        if config.scheduler_type not in SCHEDULERS:
            raise ValueError(f"scheduler_type={config.scheduler_type!r} is none of {', '.join(SCHEDULERS)}")
        compiled = asked.decode_compile_config or _compiled(asked.default_compile_level)
        if press is not None and compiled is not None:
            raise ValueError("press= watches the layers of every step, which cannot be compiled then: leave out one of the two")
        super().__init__(model, generation_config, config, workload_hints)
        on_gpu = model.device.type == "cuda"
        resolved = self.continuous_batching_config
        graphs = asked.use_cuda_graph[-1] if isinstance(asked.use_cuda_graph, tuple | list) else asked.use_cuda_graph
        resolved.use_cuda_graph = (False, on_gpu and graphs is not False)
        resolved.use_async_batching = on_gpu if asked.use_async_batching is None else asked.use_async_batching
        # Steps of prompts are not compiled: attention would cut each of their layers, for lengths that never come again.
        resolved.decode_compile_config = compiled
        self._wishes = self._wished(asked, workload_hints, max_length)

    def _wished(self, asked: Any, hints: Any, max_length: int | None) -> sizes.Wishes:
        text_config, size = self.model.config.get_text_config(), self._settings.page_size
        if max_length is None and asked.max_blocks_per_request:
            max_length = asked.max_blocks_per_request * size
        if max_length is None and hints is not None and hints.max_prompt_length:
            max_length = hints.max_prompt_length + hints.max_generated_length
        slots = asked.max_requests_per_batch
        if slots is None and hints is not None and hints.num_requests:
            slots = min(hints.num_requests, 1024)
        return sizes.Wishes(
            num_blocks=asked.num_blocks,
            num_slots=slots,
            is_usual=max_length is not None,
            max_length=max_length or getattr(text_config, "max_position_embeddings", None) or 32768,
            max_prompt=hints.max_prompt_length if hints is not None and hints.max_prompt_length else None,
        )

    def _begin_pruning(self) -> None:
        if self._press is not None:
            if self._is_parallel:
                raise ValueError("press= sees the heads of one process only: load the model without tensor parallelism")
            self._pruning = Pruning(self._press, self.model, self._settings)

    def _wishes_after(self, pruning: Pruning | None) -> sizes.Wishes:
        """What a press leaves of a known workload's prompts is what is to be stored."""
        found = self._wishes
        if pruning is None or found.max_prompt is None:
            return found
        return replace(found, max_length=max(1, found.max_length - found.max_prompt + pruning.kept(found.max_prompt)))

    def destroy(self) -> None:
        super().destroy()
        self._give_back()

    def _give_back(self) -> None:
        """The model's attention, and what a press has hooked on to it."""
        if self._original_attn_impl is not None:
            self.model.set_attn_implementation(self._original_attn_impl)
            self._original_attn_impl = None
        if self._pruning is not None:
            self._pruning.end()

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        text = model.config.get_text_config()
        original = text._attn_implementation
        if original != function.NAME:
            AttentionInterface.register(function.NAME, function.attention)
            # What sees images keeps its attention.
            part = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
            model.set_attn_implementation(function.NAME if part is None else {part: function.NAME})
            before: Any = original if part is None else {part: original}
            self._original_attn_impl = before

    def _create_batch_processor(self) -> Any:
        if self.batch_processor is not None:
            return super()._create_batch_processor()
        try:
            with self._our_cache():
                processor: Any = super()._create_batch_processor()
        except BaseException:  # an engine that never was will not be stopped, either
            self._give_back()
            raise
        kind = SCHEDULERS[self.continuous_batching_config.scheduler_type]
        ours = kind(
            cache=processor.cache,
            safety_margin=self.continuous_batching_config.safety_margin,
            max_requests_per_batch=self.continuous_batching_config.max_requests_per_batch,
        )
        ours.processor, ours.images = processor, vision.of(self.model)
        processor.scheduler = processor.offloading_manager.scheduler = ours
        runner = processor.model_runner
        if runner._compiled_decode is not None:
            runner._compiled_decode = _compiled_once(runner._compiled_decode)
        cache: Any = processor.cache
        made = self._streams = streams.make(self._compress, self._partition, cache.device, self._is_parallel)
        if made.main is not None:
            processor.inputs_and_outputs.compute_stream = processor.offloading_manager._compute_stream = made.main
        cache.steps.compute_stream = processor.inputs_and_outputs.compute_stream
        cache.compression.lane = made.lane
        return processor

    @property
    def _is_parallel(self) -> bool:
        return bool(self.distributed_helper.tp_size > 1)

    @contextmanager
    def _our_cache(self) -> Any:
        """While the engine makes its parts, it finds our cache by the name of its own; other threads find its own."""
        thread = threading.get_ident()
        with _SWAPPING:
            stock: Any = continuous_api.PagedAttentionCache

            def make(*args: Any, **kwargs: Any) -> Any:
                return self._make_cache(**kwargs) if threading.get_ident() == thread else stock(*args, **kwargs)

            continuous_api.PagedAttentionCache = make  # type: ignore[misc, assignment]
            try:
                yield
            finally:
                continuous_api.PagedAttentionCache = stock  # type: ignore[misc]

    def _make_cache(
        self, config: Any, continuous_batching_config: Any, device: Any, distributed_helper: Any, dtype: Any, **_: Any
    ) -> SlotCache:
        if self._is_parallel and vision.of(self.model) is not None:
            raise ValueError("images= has one process look at them: load the model without tensor parallelism")
        heads, head_dim = kv_shape(layer_configs(config)[0])
        assert heads is not None
        assert head_dim is not None
        query_heads, device = config.num_attention_heads, torch.device(device)
        if distributed_helper.tp_size > 1 and distributed_helper.are_kv_heads_tp_ed():
            if heads % distributed_helper.tp_size:
                raise ValueError(f"{heads} KV heads cannot be divided among {distributed_helper.tp_size} processes")
            heads, query_heads = heads // distributed_helper.tp_size, query_heads // distributed_helper.tp_size
        max_batch_tokens = continuous_batching_config.max_batch_tokens or (8192 if device.type == "cuda" else 2048)
        shape = {
            "num_layers": config.num_hidden_layers,
            "num_heads": heads,
            "head_dim": head_dim,
            "group": query_heads // heads,
            "dtype": dtype,
        }
        self._begin_pruning()
        probe = SlotLayers(self._settings, self._book, **shape, device=torch.device("cpu"), num_slots=0, table_width=1)
        token_bytes = 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize
        shown = 0 if self._pruning is None else config.num_hidden_layers * config.hidden_size * dtype.itemsize
        planned = sizes.plan(
            self._settings,
            self._wishes_after(self._pruning),
            memory=self._memory_for_cache(config, max_batch_tokens, query_heads, heads, head_dim, dtype),
            block_bytes=probe.block_bytes,
            slot_bytes=token_bytes * (self._settings.sink_tokens + self._settings.window_slots),
            token_bytes=token_bytes + shown,
            max_batch_tokens=max_batch_tokens,
            is_beside=self._compress != "inline" or self._pruning is not None,
        )
        if distributed_helper.tp_size > 1:
            planned = _least(planned, distributed_helper, device)
        continuous_batching_config.max_requests_per_batch = planned.num_slots
        continuous_batching_config.max_blocks_per_request = planned.table_width + 3
        layers = SlotLayers(
            self._settings,
            self._book,
            **shape,
            device=device,
            num_slots=planned.num_slots,
            table_width=planned.table_width,
        )
        cache = SlotCache(
            layers,
            planned,
            config=config,
            dtype=dtype,
            device=device,
            allow_block_sharing=continuous_batching_config.allow_block_sharing,
            max_batch_tokens=max_batch_tokens,
            pruning=self._pruning,
        )
        if cache.steps.rows is None:  # plain torch reads the device, which no graph can hold
            continuous_batching_config.use_cuda_graph = (False, False)
        return cache

    def _memory_for_cache(
        self, config: Any, max_batch_tokens: int, query_heads: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes left beside the model, what a step of `max_batch_tokens` computes, and the engine's own tensors."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.model.device)[0]
        else:
            free = psutil.virtual_memory().available
        available = int(free * (self.continuous_batching_config.max_memory_percent or 0.9))
        rows = self.continuous_batching_config.max_requests_per_batch or sizes.MOST_SLOTS
        # Queries, keys and values repeated for all query heads, hidden states, the widest layer of an MLP twice.
        width = (2 * query_heads + 3 * heads) * head_dim + 2 * query_heads * head_dim + 4 * config.hidden_size
        width += 2 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
        step = max_batch_tokens * (width * dtype.itemsize + 64)
        logits = rows * config.vocab_size * 12
        return available - step - logits

    # -- what users look at ----------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, Any]:
        """See `batching.stats`."""
        if self.batch_processor is None:
            return {}
        cb = self.continuous_batching_config
        cache: SlotCache = self.batch_processor.cache  # type: ignore[assignment]
        images = vision.of(self.model)
        return {
            **cache.stats() | {"compression": cache.compression.stats() | self._streams.stats()},
            **({} if images is None else {"images": images.stats()}),
            "cuda_graphs": cb.cuda_graph_booleans[1],
            "async": bool(cb.use_async_batching),
            "requests": {
                "running": len(self.batch_processor.scheduler.active_requests),
                "waiting": len(self.batch_processor.scheduler.waiting_requests) + self.input_queue.qsize(),
            },
        }


def _least(planned: sizes.Sizes, distributed_helper: Any, device: torch.device) -> sizes.Sizes:
    """What all processes have room for: they may have unequal memory."""
    least = torch.tensor([planned.num_blocks, planned.num_slots, planned.staging_tokens], device=device)
    distributed_helper.tp_all_reduce_min(least)
    blocks, slots, staging = (int(x) for x in least.tolist())
    return sizes.Sizes(blocks, slots, min(planned.table_width, blocks), staging)
