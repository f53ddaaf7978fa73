"""PagedPQCache and PagedKVCache: transformers caches whose full-attention layers live in pages, coded or exact."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from hf_pqcache import arguments
from hf_pqcache.backends import selection
from hf_pqcache.cache.base import PagedCache
from hf_pqcache.codebook import tensor_parallel
from hf_pqcache.codebook.calibrate import learn_layer
from hf_pqcache.codebook.codebook import Codebook, most_bytes
from hf_pqcache.config import PQConfig, choose_page_size
from hf_pqcache.models.positions import max_positions
from hf_pqcache.models.shapes import kv_shape, layer_configs
from hf_pqcache.models.support import full_attention
from hf_pqcache.pages.codec import EXACT
from hf_pqcache.storage.layers import Layers
from hf_pqcache.storage.storage import Storage


class PagedPQCache(PagedCache):
    """A KV cache that keeps old tokens as product-quantization codes and attends to them as they are.

    Args:
        config: the model's config (`model.config`).
        codebook: centroids, from `calibrate` or `Codebook.from_pretrained`. None learns them from the first tokens
            that the cache sees, and stays exact until there are enough.
        pq_config: shape of the cache; None means PQConfig(). A codebook decides num_subspaces and num_bits.
        compile: whether `generate` may compile the decode step. None means yes where a CUDA device is there and kernels
            serve the model's shape; models whose attention cannot be reached in compiled code never are, nor is anything
            with `offload`.
        offload: keep the pages in pinned host memory and bring a layer's to the device ahead of its turn: results are
            the same, the device needs room for the pages of two layers only, and every token costs a transfer of all
            codes; see offload.py.
        tp_rank: under tensor parallelism, this process's rank among those that share the model's KV heads: which heads
            of the codebook are its own. None takes torch.distributed's rank, if all its processes share them.
        expected_tokens: length of a sequence, prompt and new tokens together: a hint that spares growing. `page_size="auto"`
            goes by it, see `choose_page_size`; `max_pages` too few for one such sequence are refused at once.
        **overrides: single settings of PQConfig, e.g. `max_pages=4000`; also `page_size="auto"`.

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
        tp_rank: int | None = None,
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
            codebook.check_model(config)
            settings = settings.replace(num_subspaces=codebook.num_subspaces, num_bits=codebook.num_bits)
        layers: list[Any] = DynamicCache(config=config).layers
        chosen = [i for i in full_attention(config, layers) if codebook is None or i in codebook.layers]
        compile = _compiles(compile, text_config, settings)
        self._settings = settings
        owned = Layers(
            settings,
            codebook,
            len(layers),
            tp_rank=tp_rank,
            offload=offload,
            expected_tokens=expected_tokens,
            max_positions=max_positions(config),
        )
        super().__init__(config, layers, chosen, Storage(owned, learn_layer), compile)

    def _why_unfit(self, keys: Tensor, values: Tensor) -> str | None:
        try:
            self._settings.subspaces(keys.shape[3], values.shape[3])
        except ValueError as error:
            if self._settings.num_subspaces is not None:
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
        tp_rank: int | None = None,
        **overrides: Any,
    ) -> PagedPQCache:
        """A cache for `model` (or its config) with a published codebook and the settings that came with it.

        Args:
            folder_or_repo_id: a folder that `Codebook.save_pretrained` wrote, or a repository of the Hub.
            revision: commit, branch or tag; pin a commit to be sure of the same codebook tomorrow.
            compile, offload, **overrides: as in the constructor; they win over the published settings.
            tp_rank: as in the constructor; None takes it from the model's device mesh, if it has one.

        Raises what `Codebook.from_pretrained` and the constructor raise. Nothing larger than a codebook of this model
        can be is downloaded.
        """
        config = getattr(model, "config", model)
        codebook = Codebook.from_pretrained(
            folder_or_repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            max_bytes=most_bytes(config),
        )
        tp_rank = tensor_parallel.rank_of(model) if tp_rank is None else tp_rank
        return cls(config, codebook, codebook.config, compile=compile, offload=offload, tp_rank=tp_rank, **overrides)


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
            None,
            len(layers),
            EXACT,
            offload=offload,
            expected_tokens=expected_tokens,
            max_positions=max_positions(config),
        )
        super().__init__(config, layers, full_attention(config, layers), Storage(owned, learn_layer), compile)


def _compiles(wanted: bool | None, text_config: PreTrainedConfig, settings: PQConfig | None) -> bool:
    """Whether `generate` may compile decode steps: as wanted, else where kernels serve and no other process takes part."""
    return (_kernels_serve(text_config, settings) and not tensor_parallel.is_one_of_several()) if wanted is None else wanted


def _kernels_serve(text_config: PreTrainedConfig, settings: PQConfig | None) -> bool:
    """Whether decode attention of this model would run on CUDA kernels here, as far as its config tells.

    settings: what decides the shape of codes; None for exact pages.
    """
    if not torch.cuda.is_available():
        return False
    dtype = getattr(text_config, "dtype", None) or torch.float16
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = {(kv_shape(layer), getattr(layer, "num_attention_heads", None)) for layer in layer_configs(text_config)}
    return all(_serve(head_dim, heads, queries, dtype, device, settings) for (heads, head_dim), queries in shapes)


def _serve(
    head_dim: int | None,
    heads: int | None,
    query_heads: int | None,
    dtype: torch.dtype,
    device: torch.device,
    settings: PQConfig | None,
) -> bool:
    if not (head_dim and heads and query_heads):  # the config does not say
        return False
    group = query_heads // heads
    if settings is None:
        return selection.select_paged(head_dim, head_dim, group, dtype, device).name != "torch"
    try:
        num_subspaces = settings.subspaces(head_dim)
    except ValueError:  # this head_dim cannot be cut so; the layers will say it
        return False
    choice = selection.select(head_dim, head_dim, num_subspaces, settings.num_bits, group, dtype, device)
    return choice.name != "torch"
