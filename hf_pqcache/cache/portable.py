"""What lets a sequence leave a paged cache and go on in another one: the methods, for PagedCache."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from hf_pqcache.cache import exported, imported


class Portable:
    """Base class of the paged caches."""

    def export_sequence(self, seq: Hashable, *, model: Any = None) -> bytes:
        """A sequence as it is, for `import_sequence` in another cache, process or year: the bytes of a safetensors file.

        What pages hold leaves as it is, so a sequence takes about the bytes that `stats()` says of it. The cache is
        unchanged. Left padding stays behind: whoever goes on passes the row's own tokens.

        Args:
            seq: a sequence's id or, in a cache of `generate`, the number of a row.
            model: whose weights the other side shall compare with its own. A cache knows its model's config only, and that
                is compared in any case.

        Raises:
            KeyError, ValueError: there is no such sequence or row.
            NotImplementedError: the model has layers that hold more than tokens and states, see REFUSALS.md.
        """
        return exported.export(self, seq, model)  # type: ignore[arg-type]

    def import_sequence(
        self,
        data: bytes,
        seq_id: Hashable | None = None,
        *,
        model: Any = None,
        device: torch.device | str | Mapping[int, torch.device | str] | None = None,
    ) -> None:
        """Take up a sequence that a cache of the same model and settings has exported, and go on from there, bit for bit.

        What it says is checked first: nothing changes where it is refused.

        Args:
            data: what `export_sequence` returned, from a file say: `Path("talk.safetensors").read_bytes()`.
            seq_id: the id that it gets beside others of `allocate_sequence`. None: the cache has no tokens, and the sequence
                becomes the one row with which `generate` goes on.
            model: needed where the sequence was exported with it.
            device: where layers live that have had no tokens yet, one for all or by layer: `model.device`, as a rule. None
                is torch's default device.

        Raises:
            ValueError: the bytes are damaged, cut short or of something else; the sequence is of another model, dtype or
                cache; a settings differs; the cache has tokens already; its pages were made with another equaliser.
            TypeError: `data` are no bytes.
            PagesExhaustedError (PQC001), CacheOutOfMemoryError (PQC004).
        """
        imported.import_(self, data, seq_id, model, device)  # type: ignore[arg-type]
