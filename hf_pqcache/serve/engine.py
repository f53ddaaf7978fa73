"""Transformers' continuous batching as a server needs it: submit, hear of every token, cancel, look inside.

The only file of the server that touches the manager's private parts: `missing_parts` says which of them are not as expected.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_pqcache.config import PQConfig
from hf_pqcache.demo import TEXT
from hf_pqcache.models.positions import max_positions
from hf_pqcache.serve import figures
from hf_pqcache.serve.sampling import Sampler, Sampling

#: What blocks hold: codes of so many bits; tokens as they are, in blocks of ours or in transformers' own.
VARIANTS = ("4", "3", "2", "exact", "stock")
#: What is not left to transformers on a CPU.
CPU_SIZES: dict[str, Any] = {"cache_tokens": 16384, "max_batch_tokens": 512, "max_requests": 64}
#: Of a prompt that is answered before the server is ready, and of the text that comes first of all.
WARM_UP_TOKENS, USUAL_TOKENS = 64, 512
#: Most requests at a time whose scores depend on their tokens before: each takes 2 bytes of every token of the vocabulary.
HISTORIES = 256
#: Signatures that the sampler and this file rely on, in module `transformers.generation.continuous_batching`.
SIGNATURES = {
    "continuous_api.ContinuousBatchingManager.add_request": {"input_ids", "request_id", "max_new_tokens", "streaming"}
    | {"record_timestamps", "eos_token_id", "logit_processor_kwargs"},
    "continuous_api.ContinuousBatchingManager.register_result_handler": {"request_id", "callback"},
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
        compiles: whether torch.compile fuses what lies between attentions of decode steps.
        compress, partition, press: of `enable_batching`; the press by name.
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
    memory_share: float | None = None
    compiles: bool = False

    def __post_init__(self) -> None:
        only_ours = {"press": self.press is not None, "compress": self.compress != "inline"}
        if self.variant == "stock" and (asked := [name for name, value in only_ours.items() if value]):
            raise ValueError(f"{asked[0]}= is for blocks of ours, and stock blocks are transformers' own; take another variant")

    @property
    def told(self) -> str:
        """What requests are kept as, in words."""
        kind = f"{self.variant} bits" if self.variant.isdigit() else f"{self.variant} blocks"
        return kind if self.press is None else f"{kind}, press {self.press}"


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


def usual_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """A text of everyday words, as tokens; fewer where the tokenizer has few."""
    text = TEXT.read_text(encoding="utf-8")[: 8 * USUAL_TOKENS]
    return [token for token in tokenizer(text, verbose=False)["input_ids"] if 0 <= token < vocab_size][:USUAL_TOKENS]


class Engine:
    """A running manager. Made and started in any thread; `submit` and `cancel` belong to the event loop that hears.

    Args:
        model: the causal LM. settings: of `make_manager`.

    Attributes:
        capacity: most tokens of one request, its answer included. vocab_size: token ids are below it.
        most_requests: that run at a time. slots: of them, with a history. prefix_hits: tokens that were not computed again.
    """

    def __init__(self, model: Any, settings: EngineSettings) -> None:
        self.variant, self.settings = settings.variant, settings
        self.manager = make_manager(model, settings)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.slots = min(HISTORIES, settings.max_requests or HISTORIES)
        self.sampler = Sampler(self.vocab_size, self.slots, model.device, self._stream)
        self.manager.logit_processor = self.sampler
        self.numbers = itertools.count()
        self.samplings: dict[str, Sampling] = {}
        self.histories = asyncio.Semaphore(self.slots)
        self.prefix_hits = 0
        self.manager.warmup()  # makes the pool, too
        self.cache = self.manager.batch_processor.cache
        self._count_prefix_hits()
        self._part_graphs()
        self.capacity = self._capacity()
        self.most_requests = int(self.manager.continuous_batching_config.max_requests_per_batch)

    def start(self, tokenizer: Any = None) -> None:
        """Run, and answer once greedily and once with a draw: what is made when first used is made now.

        The equaliser of codes is, too, of a text that is the same everywhere if there is a tokenizer: else it would be of what
        the first client says, another one in each server, and a bad one where that is one word over and over.

        Raises RuntimeError if the engine cannot answer.
        """
        self.manager.start()
        most = min(self.capacity, max_positions(self.manager.model.config) or self.capacity) - WARM_UP_TOKENS // 8
        zeros = [0] * min(WARM_UP_TOKENS, most)
        usual = zeros if tokenizer is None else usual_ids(tokenizer, self.vocab_size)[:most] or zeros
        for ids, sampling in ((usual, Sampling(temperature=0.0)), (zeros, Sampling())):
            name = self.manager.add_request(ids, max_new_tokens=WARM_UP_TOKENS // 8, eos_token_id=-1, sampling=sampling)
            output = self.manager.get_result(name) if name is not None else None
            if output is None or output.error is not None:
                raise RuntimeError(f"the engine does not answer: {'it ended' if output is None else output.error}")

    def stop(self, timeout: float | None = None) -> None:
        """End at once: what still runs fails."""
        self.manager.stop(block=True, timeout=timeout, hard_stop=True)
        self.manager.destroy()

    def is_alive(self) -> bool:
        return bool(self.manager.is_running())

    async def submit(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling, hear: Callable[[Any], None], is_streaming: bool
    ) -> str | None:
        """Add a request -> its id, or None where the engine takes no more. Waits while all slots for histories are taken.

        hear: called in the running event loop with transformers' `GenerationOutput`, at each token if `is_streaming`, and
        in any case when it ends.
        """
        if sampling.has_history:
            await self.histories.acquire()
        name = f"request-{next(self.numbers)}"

        def heard(output: Any) -> None:
            if output.is_finished():
                self._forget(name)
            hear(output)

        self.samplings[name] = sampling
        self.manager.register_result_handler(name, heard)
        ends = list(sampling.ends) or -1
        added = self.manager.add_request(
            list(ids), name, max_tokens, is_streaming, not is_streaming, ends, sampling=sampling
        )  # fmt: skip
        if added is None:
            self._drop(name)
        return added

    def cancel(self, name: str) -> None:
        """End a request; nothing more is heard of it. Does nothing to one that has ended."""
        if name in self.samplings:
            self.manager.cancel_request(name)
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._forget(name)
        router = self.manager.output_router
        with router._lock:
            router.result_handlers.pop(name, None)

    def _forget(self, name: str) -> None:
        if (sampling := self.samplings.pop(name, None)) is not None:
            self.sampler.release(sampling)
            if sampling.has_history:
                self.histories.release()

    def drain(self) -> None:
        """Throw away what a step said of requests that were cancelled while it ran."""
        while not self.manager.output_router.output_queue.empty():
            self.manager.get_result(timeout=0)

    def state(self) -> dict[str, float]:
        """Requests that wait and run, blocks and slots used and free, what of them is empty, tokens that sharing saved."""
        return figures.state(self.settings, self.manager) | {"prefix_hits": self.prefix_hits}

    def facts(self) -> dict[str, str]:
        """What does not change: what blocks hold, the press, where finished prompts are stored, and why not as asked for."""
        return figures.facts(self.settings, self.manager)

    def _capacity(self) -> int:
        """Most tokens of one request, by halving: what our blocks say, or what an empty pool of transformers' holds."""
        from transformers.generation.continuous_batching.requests import RequestState

        nobody = RequestState(request_id="nobody", initial_tokens=[])
        refuses = getattr(self.cache, "why_unfit", None)
        low, high = 0, int(self.cache.max_tokens_read) * 2
        while low < high:
            middle = (low + high + 1) // 2
            if refuses is not None:
                fits = refuses(middle - 1, 1) is None
            else:
                fits = self.cache.can_store_request_tokens(nobody, middle, dry_run=True)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _stream(self) -> Any:
        processor = self.manager.batch_processor
        return None if processor is None else processor.inputs_and_outputs.compute_stream

    def _count_prefix_hits(self) -> None:
        search = self.cache.search_prefix_match

        def counted(request_id: str, prompt_ids: list[int]) -> int:
            found: int = search(request_id, prompt_ids)
            self.prefix_hits += found
            return found

        self.cache.search_prefix_match = counted

    def _part_graphs(self) -> None:
        """Steps that only take the largest scores keep the graphs of the warm-up; others get their own."""
        inputs = self.manager.batch_processor.inputs_and_outputs
        for part in [pair.device_io for pair in inputs.io_pairs] if hasattr(inputs, "io_pairs") else [inputs]:
            own = part._get_graph_key
            part._get_graph_key = lambda own=own: own() if self.sampler.is_plain else (*own(), "sampled")
