"""What a page holds of its tokens: product-quantization codes, or the tokens themselves; knows no sequences and no layers.

The only difference between a compressed and an uncompressed paged cache is the codec of its pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hf_pqcache.codebook import normalise, pq
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import CodeShape, Side
from hf_pqcache.pages.layout import TILE_TOKENS, PageLayout
from hf_pqcache.pages.slabs import PageSpec


class PageCodec(Protocol):
    """How one side, keys or values, of whole pages of a layer is stored. H KV heads, d head_dim, n pages of P tokens."""

    @property
    def spec(self) -> PageSpec:
        """What a page takes: shape and dtype."""

    @property
    def num_heads(self) -> int: ...

    @property
    def codes(self) -> CodeShape | None:
        """How vectors are coded; None where they are not."""

    @property
    def tokens_together(self) -> int:
        """Tokens whose numbers lie together; kernels count such groups in 32 bits."""

    def twin(self) -> PageCodec:
        """The same for a copy of the cache."""

    def encode(self, x: Tensor) -> Tensor:
        """x (H, n * P, d) -> (n, ...), what the pool stores of them."""

    def decode(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """pages (n, ...) -> (H, n * P, d) of `dtype`; the inverse of `encode` as far as there is one."""

    def are_finite(self, pages: Tensor) -> bool:
        """Whether pages (n, ...) that others have made decode to finite numbers."""


def max_page_id(codec: PageCodec, page_size: int) -> int:
    """How many pages kernels can tell apart, which count heads and tokens of all of them in 32 bits."""
    return min((1 << 31) // codec.num_heads, (1 << 32) // (codec.num_heads * page_size // codec.tokens_together))


@dataclass(frozen=True, eq=False)
class CodedPages:
    """Pages of codes and of what normalises them (`normalise`): uint8 (bytes,) each, laid out as `layout` says.

    Attributes:
        centroids: float16 (1, C, d/M), on the device of the pages. gain: see `Codebook`.
        equaliser: float32 (H, d), see `normalise.equaliser`: of keys, ones until a first page sets it; of values, ones.
    """

    layout: PageLayout
    num_heads: int
    centroids: Tensor
    gain: float
    equaliser: Tensor
    tokens_together = TILE_TOKENS

    @classmethod
    def like(cls, x: Tensor, which: Side, page_size: int, book: Codebook) -> CodedPages:
        """For keys or values like x (..., H, T, d). Raises ValueError if the codebook's subspaces do not cut them."""
        head_dim, book = x.shape[-1], book.to(x.device)
        shape = PageLayout(which, page_size, head_dim, *book.codes(which, head_dim))
        equaliser = torch.ones(x.shape[-3], head_dim, device=x.device)
        return cls(shape, x.shape[-3], book.side(which), book.gain(which), equaliser)

    def twin(self) -> CodedPages:
        """The same with an equaliser of its own."""
        return replace(self, equaliser=self.equaliser.clone())

    @property
    def codes(self) -> CodeShape:
        return CodeShape(self.layout.num_subspaces, self.layout.num_bits)

    @property
    def spec(self) -> PageSpec:
        return PageSpec((self.num_heads * self.layout.nbytes,), torch.uint8)

    def encode(self, x: Tensor) -> Tensor:
        pages = (
            normalise.rotate(x / self.equaliser[:, None]).unflatten(1, (-1, self.layout.page_size)).transpose(0, 1)
        )  # (n, H, P, d)
        coded, scales = normalise.normalise(self.layout.which, pages)
        return self.layout.join(self.layout.pack(pq.encode(coded * self.gain, self.centroids), **scales))

    def decode(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        codes, scales = self.layout.unpack(self.layout.split(pages))
        coded = pq.decode(codes, self.centroids)
        if self.layout.which == "key":
            rotated = normalise.restore_keys(coded, normalise.KeyScales(**scales))
        else:
            rotated = normalise.restore_values(coded, scales["magnitude"])
        x = normalise.rotate(rotated).transpose(0, 1).flatten(1, 2)
        return (x * self.equaliser[:, None]).to(dtype)

    def are_finite(self, pages: Tensor) -> bool:
        return self.layout.which == "value" or bool(self.layout.step(self.layout.split(pages)).isfinite().all())


@dataclass(frozen=True)
class ExactPages:
    """Pages of tokens as they came: model dtype (H, P, d) each, contiguous."""

    num_heads: int
    page_size: int
    head_dim: int
    dtype: torch.dtype
    tokens_together = 1
    codes = None

    @classmethod
    def like(cls, x: Tensor, page_size: int) -> ExactPages:
        """For keys or values like x (..., H, T, d)."""
        return cls(x.shape[-3], page_size, x.shape[-1], x.dtype)

    def twin(self) -> ExactPages:
        return self

    @property
    def spec(self) -> PageSpec:
        return PageSpec((self.num_heads, self.page_size, self.head_dim), self.dtype)

    def encode(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.page_size)).transpose(0, 1)

    def decode(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        return pages.transpose(0, 1).flatten(1, 2).to(dtype)

    def are_finite(self, pages: Tensor) -> bool:
        return bool(pages.isfinite().all())
