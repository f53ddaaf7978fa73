"""What a page holds of its tokens: product-quantization codes, or the tokens themselves; knows no rows and no layers.

The only difference between a compressed and an uncompressed paged cache is the codec of its pages.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_pqcache import layout, pq
from hf_pqcache.config import PQConfig

Which = Literal["key", "value"]


class PageCodec(Protocol):
    """How whole pages of one layer are stored. H KV heads, d head_dim, n pages."""

    #: Whether pages can be written only once centroids are known.
    needs_centroids: bool

    def new_pages(self, like: Tensor, config: PQConfig, num_subspaces: int) -> Tensor:
        """An uninitialised pool (max_pages, H, ...) for tokens like those of `like` (..., H, T, d)."""

    def encode(self, x: Tensor, centroids: Tensor, config: PQConfig, which: Which) -> Tensor:
        """x (H, n * page_size, d) -> (n, H, ...), what the pool stores of them."""

    def decode(self, pages: Tensor, centroids: Tensor, config: PQConfig, which: Which, dtype: torch.dtype) -> Tensor:
        """pages (n, H, ...) -> (H, n * page_size, d) of `dtype`; the inverse of `encode` as far as there is one."""


class CodedPages:
    """Pages of codes: uint8 (max_pages, H, page_size * M * num_bits / 8) in the orders of `layout`."""

    needs_centroids = True

    def new_pages(self, like: Tensor, config: PQConfig, num_subspaces: int) -> Tensor:
        page_bytes = config.page_size * num_subspaces * config.num_bits // 8
        return torch.empty(config.max_pages, like.shape[-3], page_bytes, dtype=torch.uint8, device=like.device)

    def encode(self, x: Tensor, centroids: Tensor, config: PQConfig, which: Which) -> Tensor:
        codes = pq.encode(x, centroids).unflatten(1, (-1, config.page_size)).transpose(0, 1)  # (n, H, page_size, M)
        return layout.pack_pages(codes, self._order(centroids, config, which), config.num_bits)

    def decode(self, pages: Tensor, centroids: Tensor, config: PQConfig, which: Which, dtype: torch.dtype) -> Tensor:
        codes = layout.unpack_pages(pages, self._order(centroids, config, which), centroids.shape[1], config.num_bits)
        return pq.decode(codes.transpose(0, 1).flatten(1, 2), centroids, dtype=dtype)

    @staticmethod
    def _order(centroids: Tensor, config: PQConfig, which: Which) -> Tensor:
        order = layout.key_order if which == "key" else layout.value_order
        return order(config.page_size, centroids.shape[1], config.num_bits)


class ExactPages:
    """Pages of tokens as they came: model dtype (max_pages, H, page_size, d), contiguous."""

    needs_centroids = False

    def new_pages(self, like: Tensor, config: PQConfig, num_subspaces: int) -> Tensor:
        shape = (config.max_pages, like.shape[-3], config.page_size, like.shape[-1])
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def encode(self, x: Tensor, centroids: Tensor, config: PQConfig, which: Which) -> Tensor:
        return x.unflatten(1, (-1, config.page_size)).transpose(0, 1)

    def decode(self, pages: Tensor, centroids: Tensor, config: PQConfig, which: Which, dtype: torch.dtype) -> Tensor:
        return pages.transpose(0, 1).flatten(1, 2)


CODED: PageCodec = CodedPages()
EXACT: PageCodec = ExactPages()
