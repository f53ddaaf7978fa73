"""Every cache that the toolkit compares, made and weighed by the same code; knows no task and no result row."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from hf_pqcache.cache.caches import PagedKVCache, PagedPQCache
from hf_pqcache.cache.footprint import OTHERS, layer_shapes
from hf_pqcache.cache.pressed import pressed
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.codebook.samples import compressible_layers
from hf_pqcache.compressors import parse as presses
from hf_pqcache.config import OPERATING_POINTS, PQConfig, Side
from hf_pqcache.eval import quantizers
from hf_pqcache.pages.layout import PageLayout

#: The caches by name, in a few words each.
ABOUT = {
    "dynamic": "transformers' DynamicCache: exact, grows as tokens come",
    "static": "transformers' StaticCache: exact, its length is taken at once",
    "quanto": "transformers' QuantizedCache by optimum-quanto",
    "hqq": "transformers' QuantizedCache by hqq",
    "fp8": "transformers' QuantizedCache in 8-bit floats",
    "pq": "PagedPQCache: product-quantization codes in pages",
    "paged-kv": "PagedKVCache: exact, in pages",
    **{name: method.about for name, method in quantizers.METHODS.items()},
}
CACHES = tuple(ABOUT)
#: Bits a value that each family offers, its default first; families that are not here offer no choice.
BITS: dict[str, tuple[float, ...]] = {"quanto": (4, 2), "hqq": (4, 8, 3, 2, 1), "pq": tuple(OPERATING_POINTS)}
BITS |= {name: method.bits for name, method in quantizers.METHODS.items() if method.bits}
#: Settings of PQConfig that say which tokens stay exact; and how vectors are coded, where its `bits` do not.
WINDOW = ("sink_tokens", "extended_residual", "page_size")
CODES = ("num_subspaces", "num_bits", "value_subspaces", "value_bits")
_PIP = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}


def check_name(text: str) -> tuple[str, float | None, tuple[str, ...]]:
    """ "hqq:3" -> ("hqq", 3, ()), "pq" -> ("pq", None, ()), "kivi:2:g32:own" -> ("kivi", 2, ("g32", "own")).

    Raises ValueError naming the choices.
    """
    name, *words = text.split(":")
    if name not in CACHES:
        raise ValueError(f"cache {name!r} is unknown; use one of {CACHES}")
    wanted = next((bits for bits in BITS.get(name, ()) if words[:1] == [str(bits)]), None)
    options = tuple(words if wanted is None else words[1:])
    if name in quantizers.METHODS and all(options) and not any(word[0].isdigit() for word in options):
        quantizers.settings_of(name, wanted, options, {})
    elif options:
        choices = f"use one of {BITS[name]}" if name in BITS else f"{name} has no choice of bits"
        raise ValueError(f"cache {text!r}: {choices}")
    return name, wanted, options


def split_press(text: str) -> tuple[str, str]:
    """ "pq:4+snapkv:0.5" -> ("pq:4", "snapkv:0.5"), "pq:4" -> ("pq:4", "").

    Raises ValueError for a press that is none, or beside a cache that cannot prune.
    """
    cache, plus, press = text.partition("+")
    if plus:
        presses.parse(press)
        if cache.partition(":")[0] not in ("pq", "paged-kv"):
            raise ValueError(f"{text}: only pq and paged-kv caches let a press prune their prompts")
    return cache, press


@dataclass(frozen=True)
class CacheSpec:
    """A kind of cache and its settings; `make` builds fresh ones.

    Attributes:
        name: one of CACHES.
        settings: the cache's own settings, JSON values: arguments of transformers' QuantizedCache or of PQConfig.
        codebook: for pq; None is the one that comes with the package.
        press: what prunes prompts before they are stored, "snapkv:0.5"; for pq and paged-kv.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    codebook: Codebook | None = None
    press: str = ""

    def __post_init__(self) -> None:
        if self.name not in CACHES:
            raise ValueError(f"cache {self.name!r} is unknown; use one of {CACHES}")

    @classmethod
    def parse(cls, text: str, head_dim: int, config: PQConfig | None = None) -> CacheSpec:
        """ "hqq", "quanto:2", "pq:3", "kivi:2:g32": a name and, after colons, bits a value and options.

        Args:
            head_dim: of the model; with it the settings of codes say both sides. 0 where layers differ.
            config: what else shapes a pq or paged-kv cache; without bits it decides everything. Its window (WINDOW) is also
                that of the quantizers that we re-made, so that all keep the same tokens exact; ":own" is their authors'.

        Raises ValueError naming the choices.
        """
        name, wanted, options = check_name(text)
        if name == "pq":
            config = config or PQConfig()
            if wanted:
                config = config.replace(bits=int(wanted), **dict.fromkeys(CODES))
            elif head_dim and any(getattr(config, code) is not None for code in CODES):
                config = config.replace(**codes_of(config, head_dim))
            return cls(name, config.to_dict())
        if name == "paged-kv":
            config = config or PQConfig()
            return cls(name, {"page_size": config.page_size, "max_pages": config.max_pages})
        if name in quantizers.METHODS:
            config = config or PQConfig()
            return cls(name, quantizers.settings_of(name, wanted, options, {key: getattr(config, key) for key in WINDOW}))
        return cls(name, {"nbits": wanted or BITS[name][0]} if name in BITS else {})

    @property
    def label(self) -> str:
        """For tables: "hqq 3 bits", "pq 4 bits", "pq M=64/32 n=8/6"."""
        if self.press:
            return f"{replace(self, press='').label}, {self.press}"
        if self.name == "pq":
            return f"pq {codes_text(self.settings)}"
        name = f"{self.name} {self.settings['nbits']} bits" if "nbits" in self.settings else self.name
        if self.settings.get("group", quantizers.GROUPS[0]) != quantizers.GROUPS[0]:
            name += f", groups of {self.settings['group']}"
        return name + (", own window" if self.settings.get("window") == "own" else "")

    @property
    def config(self) -> PQConfig:
        """Shape of a pq cache."""
        return PQConfig.from_dict(self.settings)

    def make(self, model: Any, max_tokens: int, batch: int = 1) -> Any:
        """A fresh cache for `batch` sequences of up to `max_tokens` tokens each.

        A static cache is as long as `max_tokens`; a paged one is told to expect as many.

        Raises:
            ValueError: those are too few.
            ImportError: the cache's library is not installed, or too old; the message has the line to type.
        """
        config = model.config
        if self.name == "dynamic":
            return DynamicCache(config=config)
        if self.name == "static":
            return StaticCache(config=config, max_cache_len=max_tokens)
        if self.name in ("quanto", "hqq", "fp8"):
            self._check_library()
            return QuantizedCache(self.name, config, **self.settings)
        if self.name in quantizers.METHODS:
            return quantizers.make_cache(self.name, self.settings, config)
        self.check_room(max_tokens, batch)
        if self.name == "pq":
            return PagedPQCache(config, self.codebook, self.config, expected_tokens=max_tokens)
        return PagedKVCache(config, **self.settings, expected_tokens=max_tokens)

    def pressing(self, model: Any) -> AbstractContextManager[None]:
        """Within it, caches that `make` made get their prompts pruned."""
        return pressed(model, self.press) if self.press else nullcontext()

    @property
    def kept(self) -> float:
        """The share of a prompt's tokens that is stored."""
        return 1 - presses.parse(self.press).ratio if self.press else 1.0

    def true_bits(self, model_config: Any, dtype_bits: int = 16) -> float | None:
        """Bits of each number of an old token, with every scale, offset and index that comes with it; None if not known.

        What is exact beside them (sinks, window) and what all sequences share (codebooks) does not count.
        """
        bits = self.settings.get("nbits")
        if self.name != "pq" and self.name not in quantizers.METHODS:
            return OTHERS.get(self.name if bits is None else f"{self.name}:{bits}", None if bits else float(dtype_bits))
        taken = numbers = 0.0
        try:
            for heads, *dims in layer_shapes(model_config):
                for which, dim in zip(get_args(Side), dims, strict=True):
                    taken += heads * dim * self._side_bits(which, dim)
                    numbers += heads * dim
        except ValueError:  # the config does not say how large keys are, or they are too small to be cut
            return None
        return taken / numbers if numbers else None

    def _side_bits(self, which: Side, head_dim: int) -> float:
        if self.name in quantizers.METHODS:
            return quantizers.true_bits(self.name, self.settings, head_dim)
        codes = (self.config if self.codebook is None else self.codebook).codes(which, head_dim)
        if self.codebook is not None and not self.codebook.is_normalised:
            return codes.num_subspaces * codes.num_bits / head_dim
        return PageLayout(which, self.config.page_size, head_dim, *codes).bits_per_number

    def check_room(self, max_tokens: int, batch: int = 1) -> None:
        """Raises ValueError if `max_pages` was set and is too few for `batch` sequences of `max_tokens` tokens."""
        asked = self.settings.get("max_pages")
        if asked is None:
            return
        page_size = self.settings["page_size"]
        coded = self.config.coded_tokens(max_tokens) if self.name == "pq" else max_tokens
        needed = batch * -(-coded // page_size)
        if needed > asked:
            raise ValueError(
                f"max_pages={asked} pages of {page_size} tokens are too few for {batch} x {max_tokens} tokens; use {needed}"
            )

    def _check_library(self) -> None:
        if self.name == "fp8":
            from transformers import cache_utils

            if not hasattr(cache_utils, "Fp8QuantizedLayer"):
                raise ImportError("this transformers has no fp8 cache; type: pip install 'transformers>=5.23'")
            return
        module, package = _PIP[self.name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"the {self.name} cache needs {package}; type: pip install {package}") from error


@dataclass(frozen=True)
class CacheBytes:
    """What a cache occupies.

    Attributes:
        tokens: bytes that belong to its tokens: keys, values, codes, scales, windows, page tables.
        shared: bytes of codebooks, which all sequences share.
        bits: `tokens`, in bits for each key or value number that was put in; None for a model whose shape is unknown.
        reserved: bytes that the cache holds for both, on the device and the host: memory comes in slabs.
    """

    tokens: int
    shared: int
    bits: float | None
    reserved: int


def weigh(cache: Any, model: Any, num_tokens: int) -> CacheBytes:
    """Weigh a cache that holds `num_tokens` tokens, over all rows, in the layers that keep every token.

    A paged cache reports the pages in use, and as reserved also memory for pages to come; of any other cache every
    storage is counted that its layers reach, whole, a storage shared by several tensors once.
    """
    layers = compressible_layers(model.config)
    if hasattr(cache, "stats"):
        stats = cache.stats()
        shared = stats["bytes"].get("codebooks", 0)
        total, reserved = sum(stats["bytes"].values()) - shared, stats["bytes_reserved"]
    else:
        total, shared = storage_bytes([cache.layers[i] for i in layers]), 0
        reserved = total
    numbers = kv_numbers_per_token(model) * num_tokens
    return CacheBytes(total, shared, 8 * total / numbers if numbers else None, reserved)


def kv_numbers_per_token(model: Any) -> int:
    """Key and value numbers of one token, over the layers that keep every token; 0 if the config does not say."""
    try:
        return sum(heads * (dk + dv) for heads, dk, dv in layer_shapes(model.config))
    except ValueError:
        return 0


def head_dim_of(config: Any) -> int:
    """Numbers of every key and every value that is compressed, from a transformers config; 0 if they differ or it is silent."""
    try:
        dims = {dim for _, *dims in layer_shapes(config) for dim in dims}
    except ValueError:
        return 0
    return dims.pop() if len(dims) == 1 else 0


def codes_of(source: PQConfig | Codebook, head_dim: int) -> dict[str, int]:
    """The settings CODES of keys and values of so many numbers. Raises ValueError naming the legal choices."""
    return dict(zip(CODES, (*source.codes("key", head_dim), *source.codes("value", head_dim)), strict=True))


def codes_text(settings: Mapping[str, Any]) -> str:
    """How a cache of these settings codes: "4 bits", "M=64 n=8", of keys and values "M=64/32 n=8/6"; "" if they do not say."""
    m, n, value_m, value_n = (settings.get(name) for name in CODES)
    sides = {"M": (m, m if value_m is None else value_m), "n": (n, n if value_n is None else value_n)}
    told = [f"{name}={'/'.join(str(x or '') for x in dict.fromkeys(both))}" for name, both in sides.items() if any(both)]
    return " ".join(told) or (f"{settings['bits']} bits" if "bits" in settings else "")


def storage_bytes(root: Any) -> int:
    """Bytes of all distinct tensor storages that are reachable from `root` through attributes, lists and dicts."""
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in _tensors(root, set()):
        storage = tensor.untyped_storage()
        sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Plain tensors reachable from `value`; wrapper subclasses (quanto's) are opened by their own flatten protocol."""
    if id(value) in seen or isinstance(value, str | bytes | int | float | type(None) | type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name), seen)
        elif value.numel():
            yield value
        return
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for child in (*children, *getattr(value, "__dict__", {}).values()):
        yield from _tensors(child, seen)
