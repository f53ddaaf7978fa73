"""What lets prefixes leave a batching engine and come into another one: the methods, for BlocksManager."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from operator import index
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import torch

from hf_pqcache.batching import prefix_file, prefixes
from hf_pqcache.batching.prefixes import Taken

if TYPE_CHECKING:
    from hf_pqcache.batching.blocks import SlotCache


class Portable:
    """Base class of the manager, which may run meanwhile: its engine waits between two steps."""

    model: Any
    batch_processor: Any

    def export_prefixes(self, prompts: Sequence[Sequence[int]], *, most_bytes: int | None = None) -> bytes:
        """What blocks hold of the beginnings of prompts, for `import_prefixes` in another process or year.

        These are the bytes of a safetensors file: complete blocks as they are, their tokens, the exact first tokens before
        them, and what they were coded with. The engine is unchanged.

        Args:
            prompts: token ids, with answers if they are to be gone on from; the most important first. Of what is not, or not
                whole, in blocks nothing leaves; with none there the bytes still tell the equaliser.
            most_bytes: of blocks. Those that most prompts begin with leave first.

        Raises:
            RuntimeError: the manager has not been started or warmed up.
            ValueError: it shares no prefixes.
            TypeError: prompts are no lists of token ids.
            NotImplementedError: the model is spread over several processes.
        """
        with self._between_steps() as cache:
            most = prefix_file.known_tokens(self.model)
            found = prefixes.take(cache, [_before(ids, most) for ids in prompts], most_bytes)
            cache.exchanged["exported"] += len(found.blocks)
            facts = prefix_file.facts(cache, self.model)
        return prefix_file.pack(facts, found)

    def import_prefixes(self, data: bytes) -> Taken:
        """Keep prefixes that another engine of the same model and settings has exported, as if they had been computed here.

        Later prompts that begin so share them. What the bytes say is checked first: nothing changes where they are refused.
        Half of the free blocks may be taken; what has no room is left out, the least used first. The codes of one engine have
        one equaliser: where there are none yet, the imported one is taken, else both must be equal.

        Returns:
            How many blocks were taken, known already, and left out, as `stats()["prefixes"]` counts them.

        Raises:
            TypeError: `data` are no bytes.
            ValueError: they are damaged, cut short or of something else; of another model, dtype or engine; a setting differs;
                codes here have another equaliser; the manager shares no prefixes.
            RuntimeError: the manager has not been started or warmed up.
            NotImplementedError: the model is spread over several processes.
        """
        cache = self._cache()
        try:
            with self._between_steps() as cache:
                own = prefix_file.facts(cache, self.model)  # transformers changes the config while a step runs
            new = prefix_file.unpack(cache, own, prefix_file.known_tokens(self.model), data)
            with self._between_steps() as cache:
                taken = prefixes.put(cache, new)
        except ValueError:
            cache.exchanged["refused"] += 1
            raise
        cache.exchanged.update(taken._asdict())
        return taken

    def _cache(self) -> SlotCache:
        if self.batch_processor is None:
            raise RuntimeError("the engine has no blocks yet: start() the manager or warmup() it first")
        manager: Any = self
        cache: SlotCache = self.batch_processor.cache
        if manager._is_parallel:
            raise NotImplementedError("each process holds its own heads: prefixes of a model over several cannot be exchanged")
        if not cache.use_prefix_sharing:
            why = "allow_block_sharing=False" if cache.pruning is None else "a press prunes each prompt by itself"
            raise ValueError(f"the engine shares no prefixes: {why}")
        return cache

    @contextmanager
    def _between_steps(self) -> Iterator[SlotCache]:
        """The cache, while no step is prepared or computed."""
        manager: Any = self
        with manager.pause() if manager.is_running() else nullcontext(), torch.inference_mode():
            cache = self._cache()
            yield cache
            if cache.layers.windows.is_cuda:
                torch.cuda.current_stream(cache.device).synchronize()


def _before(ids: Sequence[int], most: int) -> list[int]:
    """The tokens before the first one that only this process knows. Raises TypeError for what are no tokens."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"prompts must be lists of token ids, one of them is {short(ids)}")
    return list(takewhile(lambda token: token < most, map(index, ids)))
