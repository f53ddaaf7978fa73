"""What a page holds of its tokens: product-quantization codes, or the tokens themselves; knows no rows and no layers.

The only difference between a compressed and an uncompressed paged cache is the codec of its pages.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hf_pqcache.codebook import pq
from hf_pqcache.config import PQConfig
from hf_pqcache.pages import layout
from hf_pqcache.pages.slabs import PageSpec, Which


class PageCodec(Protocol):
    """How whole pages of one layer are stored. H KV heads, d head_dim, n pages."""

    #: Whether pages can be written only once centroids are known.
    needs_centroids: bool

    #: Tokens whose numbers lie together; kernels count such groups in 32 bits.
    tokens_together: int

    def spec(self, like: Tensor, config: PQConfig, num_subspaces: int) -> PageSpec:
        """What one page takes for tokens like those of `like` (..., H, T, d): shape (H, ...) and dtype."""

    def encode(self, x: Tensor, centroids: Tensor, config: PQConfig, which: Which) -> Tensor:
        """x (H, n * page_size, d) -> (n, H, ...), what the pool stores of them."""

    def decode(self, pages: Tensor, centroids: Tensor, config: PQConfig, which: Which, dtype: torch.dtype) -> Tensor:
        """pages (n, H, ...) -> (H, n * page_size, d) of `dtype`; the inverse of `encode` as far as there is one."""


class CodedPages:
    """Pages of codes: uint8 (H, page_size * M * num_bits / 8) each, in the orders of `layout`."""

    needs_centroids = True
    tokens_together = layout.TILE_TOKENS

    def spec(self, like: Tensor, config: PQConfig, num_subspaces: int) -> PageSpec:
        return PageSpec((like.shape[-3], config.page_size * num_subspaces * config.num_bits // 8), torch.uint8)

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
    """Pages of tokens as they came: model dtype (H, page_size, d) each, contiguous."""

    needs_centroids = False
    tokens_together = 1

    def spec(self, like: Tensor, config: PQConfig, num_subspaces: int) -> PageSpec:
        return PageSpec((like.shape[-3], config.page_size, like.shape[-1]), like.dtype)

    def encode(self, x: Tensor, centroids: Tensor, config: PQConfig, which: Which) -> Tensor:
        return x.unflatten(1, (-1, config.page_size)).transpose(0, 1)

    def decode(self, pages: Tensor, centroids: Tensor, config: PQConfig, which: Which, dtype: torch.dtype) -> Tensor:
        return pages.transpose(0, 1).flatten(1, 2).to(dtype)


CODED: PageCodec = CodedPages()
EXACT: PageCodec = ExactPages()
