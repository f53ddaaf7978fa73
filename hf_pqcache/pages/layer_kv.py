"""What one layer stores of its sequences, and where a token of theirs lies; knows no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.codebook import normalise
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.pages.block_pool import PageTable
from hf_pqcache.pages.codec import CodedPages, PageCodec
from hf_pqcache.pages.slabs import PageStore

_NONE = torch.empty(0, dtype=torch.int32)  # until a device's state has room for the layer


@dataclass(eq=False)
class LayerView:
    """Everything that append and attention touch of one layer; tensors keep their addresses while the cache lives.

    A row is one sequence. Its token t (0-based, its own count) is kept: t < sink_tokens exactly, in window slot t; the
    next `coded_tokens(length)` in pages, the i-th of them in page `table.rows[row][i // page_size]`; the newest
    exactly, in window slot `sink_tokens + (t - sink_tokens) % window_slots`.

    Attributes:
        config: shape of the cache.
        store: whole pages as the codecs make them.
        table: which pages the rows have; the host's side of `page_table`.
        key_codec, value_codec: what a page holds of keys and of values.
        is_equalised: whether the key codec's equaliser is that of pages that there are; until then it may be set.
        window_keys, window_values: model dtype (batch, num_kv_heads, sink_tokens + window_slots, head_dim).
        seq_lens: int32 (batch, 2): tokens of each row, and how many of them are in pages, kept on the device; advanced by
            append.
        left_pad: int32 (batch): position in the attention mask of each row's first token (its left padding).
        page_table: int32 (batch, width): the row's pages in order, by the ids that this layer's kernels find them with; -1
            where unused.
        kernels: what the CUDA backend prepared for this layer (`cuda_backend.Prepared`), None where plain torch serves it.
        bases: the addresses of keys and values that the ids in `page_table` count from.
        device: of all tensors. Code that is compiled asks here, where it need not check a tensor of every layer in each step.
    """

    config: PQConfig
    key_codec: PageCodec
    value_codec: PageCodec
    window_keys: Tensor
    window_values: Tensor
    store: PageStore
    seq_lens: Tensor = _NONE
    left_pad: Tensor = _NONE
    page_table: Tensor = _NONE
    table: PageTable | None = None
    is_equalised: bool = False
    kernels: Any = None
    bases: tuple[int, int] = (0, 0)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.window_keys.device

    def codec(self, which: Side) -> PageCodec:
        return self.key_codec if which == "key" else self.value_codec

    @property
    def has_codes(self) -> bool:
        """Whether pages hold codes, not the tokens themselves."""
        return isinstance(self.key_codec, CodedPages)

    def equalise(self, keys: Tensor) -> None:
        """Set the equaliser by the first keys (H, T, d) that become pages, unless pages were written by another."""
        if isinstance(self.key_codec, CodedPages) and not self.is_equalised:
            self.key_codec.equaliser.copy_(normalise.equaliser(keys))
            self.is_equalised = True

    def page_numbers(self, row: int, first: int, last: int) -> list[int]:
        """Pages first..last-1 of a row. Raises PagesExhaustedError if it has not got them."""
        pages = self.table.rows[row][first:last] if self.table is not None else []
        if len(pages) != last - first:
            raise PagesExhaustedError(
                f"row {row} needs {last} pages and owns {first + len(pages)}: nobody reserved them. Call the cache's "
                "get_mask_sizes() before every step, as generate does"
            )
        return pages

    @property
    def lengths(self) -> Tensor:
        """int32 (batch): tokens of each row."""
        return self.seq_lens[:, 0]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Let rows hold `lengths` tokens."""
        # Not waited for: the driver has taken a copy of such a small pageable tensor when the call returns.
        self.seq_lens.copy_(self.seq_lens_of(lengths), non_blocking=True)

    def seq_lens_of(self, lengths: Sequence[int]) -> Tensor:
        """int32 (batch, 2) on the CPU: `seq_lens` of rows that hold `lengths` tokens."""
        return torch.tensor([[n, self.coded_tokens(n)] for n in lengths], dtype=torch.int32)

    @property
    def window_slots(self) -> int:
        """Ring slots of the window, without sinks."""
        return self.config.window_slots

    def coded_tokens(self, length: int) -> int:
        """How many of a row's first `length` tokens are in pages."""
        return self.config.coded_tokens(length)
