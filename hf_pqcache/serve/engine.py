"""Transformers' continuous batching as a server needs it: submit, hear of every token, cancel, look inside.

The only file of the server that touches the running manager's private parts; `manager.py` says which there must be.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hf_pqcache.models.positions import max_positions
from hf_pqcache.serve import figures
from hf_pqcache.serve.group import Group, LostError
from hf_pqcache.serve.manager import EngineSettings, make_manager
from hf_pqcache.serve.recent import Recent, Text
from hf_pqcache.serve.sampling import Sampler, Sampling
from hf_pqcache.serve.usual import usual_ids

if TYPE_CHECKING:
    from hf_pqcache.batching.prefixes import Taken

#: In which a process that has ended is known to have.
LOST_S = 1.0
#: Of a prompt that is answered before the server is ready.
WARM_UP_TOKENS = 64
#: Most requests at a time whose scores depend on their tokens before: each takes 2 bytes of every token of the vocabulary.
HISTORIES = 256


class Awake(threading.Event):
    """Never waits: a process that follows is paced by the one that leads, with whom it meets each step."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


class Engine:
    """A running manager. Made and started in any thread; `submit` and `cancel` belong to the event loop that hears.

    Args:
        model: the causal LM. settings: of `make_manager`.
        group: of the processes that share the model, if this one leads them. when_failed: called in the engine's thread if a
            step fails of a process that follows.

    Attributes:
        capacity: most tokens of one request, its answer included. vocab_size: token ids are below it.
        most_requests: that run at a time. slots: of them, with a history. prefix_hits: tokens that were not computed again.
        recent: the last texts, for `export_prefixes`.
    """

    def __init__(
        self,
        model: Any,
        settings: EngineSettings,
        group: Group | None = None,
        when_failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.variant, self.settings, self.group = settings.variant, settings, group
        self.manager = make_manager(model, settings)
        if (found := self.manager.distributed_helper.tp_size) != settings.processes:
            raise ValueError(f"the model is spread over {found} processes, and the engine's settings say {settings.processes}")
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.slots = min(HISTORIES, settings.max_requests or HISTORIES)
        self.sampler = Sampler(self.vocab_size, self.slots, model.device, self._stream)
        self.manager.logit_processor = self.sampler
        if group is not None or when_failed is not None:
            self._part_with_the_lost(when_failed)
        self.numbers = itertools.count()
        self.samplings: dict[str, Sampling] = {}
        self.histories = asyncio.Semaphore(self.slots)
        self.prefix_hits = 0
        self.manager.warmup()  # makes the pool, too
        self.cache = self.manager.batch_processor.cache
        self._count_prefix_hits()
        self._part_graphs()
        self.capacity = self._capacity()
        self.recent = Recent(self.cache.num_blocks * self.manager.continuous_batching_config.page_size)
        self.most_requests = int(self.manager.continuous_batching_config.max_requests_per_batch)

    def start(self, tokenizer: Any = None) -> None:
        """Run, and answer once greedily and once with a draw: what is made when first used is made now.

        The equaliser of codes is, too, of a text that is the same everywhere if there is a tokenizer: else it would be of what
        the first client says, another one in each server, and a bad one where that is one word over and over.

        Raises RuntimeError if the engine cannot answer.
        """
        self.manager.start()
        if not self.manager.is_tp_driver:
            return
        most = min(self.capacity, max_positions(self.manager.model.config) or self.capacity) - WARM_UP_TOKENS // 8
        zeros = [0] * min(WARM_UP_TOKENS, most)
        usual = zeros if tokenizer is None else usual_ids(tokenizer, self.vocab_size)[:most] or zeros
        for ids, sampling in ((usual, Sampling(temperature=0.0)), (zeros, Sampling())):
            name = self.manager.add_request(ids, max_new_tokens=WARM_UP_TOKENS // 8, eos_token_id=-1, sampling=sampling)
            output = self.manager.get_result(name) if name is not None else None
            if output is None or output.error is not None:
                raise RuntimeError(f"the engine does not answer: {'it ended' if output is None else output.error}")

    def follow(self) -> None:
        """Compute the steps of the process that leads, until its engine ends. What comes of requests is not heard here."""
        self.manager._wake_up_loop = Awake()
        while self.manager.is_running():
            self.manager.get_result(timeout=1)

    def stop(self, timeout: float | None = None) -> None:
        """End at once: what still runs fails. Of a group of which a process is lost, the others end; a thread may be left."""
        if self.group is not None and self.group.error is not None:
            self.group.end()
            return
        if self.group is not None:
            self.group.may_end()
        self.manager.stop(block=True, timeout=timeout, hard_stop=True)
        if not self.manager.is_running():
            self.manager.destroy()
        if self.group is not None:
            self.group.end()

    def is_alive(self) -> bool:
        return bool(self.manager.is_running()) and (self.group is None or self.group.error is None)

    @property
    def why_dead(self) -> str:
        """What clients are told of an engine that is not alive."""
        lost = None if self.group is None else self.group.error
        return f"the engine has died{f' ({lost})' if lost else ''}; the server has to be started anew"

    def _part_with_the_lost(self, when_failed: Callable[[BaseException], None] | None) -> None:
        """Of several processes, those that cannot compute a step with the others do not wait for them."""
        handle = self.manager._handle_critical_error

        def handled(error: Exception, batch_processor: Any) -> None:
            if when_failed is not None:
                when_failed(error)
            if self.group is not None:
                self.group.lost.wait(LOST_S)  # the connection breaks before the process is known to have ended
                self.group.end()
            with suppress(RuntimeError):  # of the others, who are told
                handle(self.group.error or error if self.group is not None else error, batch_processor)

        self.manager._handle_critical_error = handled

    @property
    def exchanges_prefixes(self) -> bool:
        """Whether prefixes may leave, or come from elsewhere."""
        return self.variant != "stock" and self.cache.use_prefix_sharing and not self.manager._is_parallel

    def export_prefixes(self, texts: Sequence[Text], most_bytes: int | None = None) -> bytes:
        """What is stored of texts, the most important first, as `export_prefixes` of the manager says. In any thread."""
        return bytes(self.manager.export_prefixes([text.ids for text in texts], most_bytes=most_bytes))

    def import_prefixes(self, data: bytes, texts: Sequence[Text] | None = None) -> Taken:
        """Keep what another engine has exported, as `import_prefixes` of the manager says. In any thread.

        texts: that they are of; None is whatever `data` has, of unknown keys.
        """
        from hf_pqcache.batching.prefix_file import texts_of

        taken: Taken = self.manager.import_prefixes(data)
        for key, ids in reversed(texts or [Text(None, array("i", ids)) for ids in texts_of(data)]):
            self.recent.note(key, ids)
        return taken

    async def submit(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling, hear: Callable[[Any], None], is_streaming: bool
    ) -> str | None:
        """Add a request -> its id, or None where the engine takes no more. Waits while all slots for histories are taken.

        hear: called in the running event loop with transformers' `GenerationOutput`, at each token if `is_streaming`, and
        in any case when it ends.
        """
        if sampling.has_history:
            await self.histories.acquire()
            self.sampler.take(sampling)
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


def started(
    load: Callable[[], tuple[Any, Any]],
    settings: EngineSettings,
    when_lost: Callable[[LostError], None],
    before: Callable[[Engine], None] = lambda engine: None,
) -> tuple[Any, Any, Engine]:
    """A model, its tokenizer and its engine, which runs; in several processes if the settings say so.

    Args:
        load: makes (model, tokenizer), in each process. when_lost: as of `Group`; what is waited for here may never come then.
        before: called with the engine before it is asked anything.
    """
    group = Group(settings.processes, (load, settings), when_lost) if settings.processes > 1 else None
    try:
        model, tokenizer = load()
        engine = Engine(model, settings, group)
        before(engine)
        engine.start(tokenizer)
    except BaseException as error:
        if group is None:
            raise
        group.lost.wait(LOST_S)
        group.end()
        raise group.error or error from None
    return model, tokenizer, engine
