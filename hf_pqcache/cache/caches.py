"""PagedPQCache and PagedKVCache: transformers caches whose full-attention layers live in pages, coded or exact."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from hf_pqcache import arguments
from hf_pqcache.backends import dispatch
from hf_pqcache.cache.base import PagedCache
from hf_pqcache.codebook import shipped
from hf_pqcache.codebook.asked import check_asked
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig, choose_page_size
from hf_pqcache.models.positions import max_positions
from hf_pqcache.models.shapes import kv_shape, layer_configs
from hf_pqcache.models.support import full_attention
from hf_pqcache.storage.layers import BookOf, Layers
from hf_pqcache.storage.storage import Storage


class PagedPQCache(PagedCache):
    """A KV cache that keeps old tokens as product-quantization codes and attends to them as they are.

    Args:
        config: the model's config (`model.config`).
        codebook: centroids of a model's own, from `calibrate` or `Codebook.from_pretrained`. None takes those that come
            with the package, which suit every model.
        pq_config: shape of the cache; None means PQConfig(). A codebook decides how vectors are cut and coded;
            `bits` and the like beside it are refused where they say something else.
        compile: whether `generate` may compile the decode step. None means yes where a CUDA device is there and kernels
            serve the model's shape; models whose attention cannot be reached in compiled code never are, nor is anything
            with `offload`.
        offload: keep the pages in pinned host memory and bring a layer's to the device ahead of its turn: results are
            the same, the device needs room for the pages of two layers only, and every token costs a transfer of all
            codes; see offload.py.
        expected_tokens: length of a sequence, prompt and new tokens together: a hint that spares growing. `page_size="auto"`
            goes by it, see `choose_page_size`; `max_pages` too few for one such sequence are refused at once.
        **overrides: single settings of PQConfig, above all `bits`: 4 (the default), 3 or 2; also `page_size="auto"`.

    Memory is taken as tokens come, a slab of pages at a time, and goes with them. A token that finds no page below
    `max_pages` is refused with PagesExhaustedError (PQC001), without `max_pages` one that finds no memory (PQC004).

    Raises:
        ValueError: the codebook was made for another model, or a setting is out of range.
        TypeError: a model, a path or a dict in place of a config or a codebook.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codebook: Codebook | None = None,
        pq_config: PQConfig | None = None,
        *,
        compile: bool | None = None,
        offload: bool = False,
        expected_tokens: int | None = None,
        **overrides: Any,
    ) -> None:
        arguments.check_config(config)
        arguments.check_codebook(codebook)
        arguments.check_pq_config(pq_config)
        text_config = config.get_text_config(decoder=True)
        if "page_size" in overrides:
            overrides["page_size"] = choose_page_size(overrides["page_size"], expected_tokens)
        settings = (pq_config or PQConfig()).replace(**overrides)
        if expected_tokens is not None:
            settings.check_room(expected_tokens)
        if codebook is not None:
            if not codebook.is_normalised:
                raise ValueError("this codebook is MILLION's, for comparison (`pqcache run -m`); caches take normalised ones")
            codebook.check_model(config)
            check_asked(codebook, config, settings, overrides.keys())
        layers: list[Any] = DynamicCache(config=config).layers
        book_of = partial(_codebook_for, settings, codebook)
        compile = _compiles(compile, text_config, book_of)
        self._settings, self._codebook = settings, codebook
        owned = Layers(
            settings,
            len(layers),
            book_of,
            offload=offload,
            expected_tokens=expected_tokens,
            max_positions=max_positions(config),
        )
        super().__init__(config, layers, full_attention(config, layers), Storage(owned), compile)

    def _why_unfit(self, keys: Tensor, values: Tensor) -> str | None:
        try:
            _codebook_for(self._settings, self._codebook, keys.shape[3], values.shape[3])
        except ValueError as error:
            settings = self._settings
            if self._codebook is not None or (settings.num_subspaces, settings.value_subspaces) != (None, None):
                raise
            return str(error)
        return None

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike[str],
        model: Any,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        compile: bool | None = None,
        offload: bool = False,
        **overrides: Any,
    ) -> PagedPQCache:
        """A cache for `model` (or its config) with a published codebook and the settings that came with it.

        Args:
            folder_or_repo_id: a folder that `Codebook.save_pretrained` wrote, or a repository of the Hub.
            revision: commit, branch or tag; pin a commit to be sure of the same codebook tomorrow.
            compile, offload, **overrides: as in the constructor; they win over the published settings.

        Raises what `Codebook.from_pretrained` and the constructor raise. Nothing larger than a codebook can be is
        downloaded.
        """
        config = getattr(model, "config", model)
        codebook = Codebook.from_pretrained(
            folder_or_repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls(config, codebook, PQConfig(**codebook.settings), compile=compile, offload=offload, **overrides)


class PagedKVCache(PagedCache):
    """A KV cache that keeps exact tokens in pages, and so takes memory as tokens arrive and shares common prefixes.

    Its window is a sequence's unfinished page; whole pages are never changed. Results are those of DynamicCache.

    Args:
        config: the model's config (`model.config`).
        page_size: tokens a page holds; a multiple of 16 from 16 to 512, or "auto".
        max_pages: as in PQConfig: most pages that all sequences may have together (PQC001); None, as many as there is memory
            for.
        expected_tokens: as in PagedPQCache.
        compile: whether `generate` may compile the decode step. None means as for PagedPQCache.
        offload: keep the pages in pinned host memory, as in PagedPQCache.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        page_size: int | str = 64,
        max_pages: int | None = None,
        expected_tokens: int | None = None,
        compile: bool | None = None,
        offload: bool = False,
    ) -> None:
        arguments.check_config(config)
        page_size = choose_page_size(page_size, expected_tokens)
        settings = PQConfig(page_size=page_size, max_pages=max_pages, sink_tokens=0, extended_residual=1)
        if expected_tokens is not None:
            settings.check_room(expected_tokens)
        layers: list[Any] = DynamicCache(config=config).layers
        compile = _compiles(compile, config.get_text_config(decoder=True), None)
        self._settings = settings
        owned = Layers(
            settings,
            len(layers),
            None,
            offload=offload,
            expected_tokens=expected_tokens,
            max_positions=max_positions(config),
        )
        super().__init__(config, layers, full_attention(config, layers), Storage(owned), compile)


def _codebook_for(settings: PQConfig, codebook: Codebook | None, head_dim: int, value_dim: int) -> Codebook:
    """The codebook of a layer whose keys and values have so many numbers. Raises ValueError where none can cut them."""
    if codebook is None:
        return shipped.codebook(settings, head_dim, value_dim)
    codebook.codes("key", head_dim), codebook.codes("value", value_dim)
    return codebook


def _is_one_of_several() -> bool:
    """Whether torch.distributed runs this process beside others: a step may then hold collectives, which are not compiled
    unless asked for."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _compiles(wanted: bool | None, text_config: PreTrainedConfig, book: BookOf | None) -> bool:
    """Whether `generate` may compile decode steps: as wanted, else where kernels serve and no other process takes part."""
    return (_kernels_serve(text_config, book) and not _is_one_of_several()) if wanted is None else wanted


def _kernels_serve(text_config: PreTrainedConfig, book: BookOf | None) -> bool:
    """Whether decode attention of this model would run on CUDA kernels here, as far as its config tells.

    book: of a layer, by what its keys and values have of numbers; None for exact pages.
    """
    if not torch.cuda.is_available():
        return False
    dtype = getattr(text_config, "dtype", None) or torch.float16
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = {(kv_shape(layer), getattr(layer, "num_attention_heads", None)) for layer in layer_configs(text_config)}
    return all(_serve(head_dim, heads, queries, dtype, device, book) for (heads, head_dim), queries in shapes)


def _serve(
    head_dim: int | None,
    heads: int | None,
    query_heads: int | None,
    dtype: torch.dtype,
    device: torch.device,
    book: BookOf | None,
) -> bool:
    if not (head_dim and heads and query_heads):  # the config does not say
        return False
    group = query_heads // heads
    codes: dispatch.Codes = (None, None)
    if book is not None:
        try:
            found = book(head_dim, head_dim)
        except ValueError:  # this head_dim cannot be cut so; the layers will say it
            return False
        codes = found.codes("key", head_dim), found.codes("value", head_dim)
    return dispatch.select((head_dim, head_dim), codes, group, dtype, device).name != "torch"
