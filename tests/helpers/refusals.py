"""What the caches refuse or do not speed up, and why: hf_pqcache/cache/REFUSALS.md, each entry with a check that it is so.

`python tests/helpers/refusals.py` prints the table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import COMMON, SMALL, build, codebook_of, padded, tokens
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_pqcache import Codebook, PagedPQCache, calibrate, pressed
from hf_pqcache.errors import NoKernelError, PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs


@dataclass(frozen=True)
class Entry:
    """A line of the table. `check` raises if it is not so."""

    what: str
    answer: str
    why: str
    check: Callable[[], None]


def _cache(name: str = "llama", count: int = 50, **options: Any) -> PagedPQCache:
    cache = PagedPQCache(build(name).config, codebook_of(name), SMALL, **options)
    _pass(cache, name, count)
    return cache


def _pass(cache: Any, name: str = "llama", count: int = 50, rows: int = 2) -> None:
    if count:
        with torch.no_grad():
            build(name)(tokens(rows, count), **cache_kwargs(cache))


def _raises(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match):
        call()


def _pickle() -> None:
    import pickle

    _raises(TypeError, "cannot be pickled", lambda: pickle.dumps(_cache(count=0)))


def _assignment() -> None:
    _raises(AttributeError, "cannot be assigned", lambda: setattr(_cache().layers[0], "keys", torch.zeros(1)))


def _pruned_padding() -> None:
    cache = _cache(count=0)
    with pressed(build("llama"), "knorm:0.5"):
        _raises(ValueError, "without padding", lambda: build("llama")(**padded(2, 50)[0], **cache_kwargs(cache)))


def _pruned_pieces() -> None:
    options = {"prefill_chunk_size": 16, "max_new_tokens": 2, **cache_kwargs(_cache(count=0))}
    with pressed(build("llama"), "knorm:0.5"):
        _raises(ValueError, "prefill_chunk_size", lambda: build("llama").generate(tokens(2, 40), **options))
        _raises(ValueError, "pressed already", lambda: pressed(build("llama"), "snapkv:0.5").__enter__())


def _pruned_crop() -> None:
    with pressed(build("llama"), "knorm:0.5"):
        cache = _cache()
    _raises(ValueError, "each head kept others", lambda: cache.crop(-1))


def _more_than_a_press() -> None:
    base = type("Base", (), {"compress": lambda self, *args: None, "forward_hook": lambda self: None})
    press = type("Decoding", (base,), {"forward_hook": lambda self: None})()
    _raises(ValueError, "while decoding", lambda: pressed(build("llama"), press).__enter__())


def _offload() -> None:
    for call in (lambda: _cache().layers[0].offload(), lambda: _cache().layers[0].prefetch()):
        _raises(NotImplementedError, "share their pages", call)


def _crop() -> None:
    _raises(ValueError, "pass a negative number", lambda: _cache().crop(5))


def _encoder_decoder() -> None:
    ids = {"vocab_size": 128, "decoder_start_token_id": 0, "pad_token_id": 0}
    config = tf.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, **ids)
    model: Any = tf.T5ForConditionalGeneration(config).eval()
    cache = PagedPQCache(model.config, num_bits=4)
    _raises(ValueError, "EncoderDecoderCache", lambda: model.generate(tokens(1, 9), **cache_kwargs(cache), max_new_tokens=3))


def _mixed_use() -> None:
    cache = _cache(count=0)
    cache.allocate_sequence("a")
    _raises(ValueError, "allocate_sequence", lambda: _pass(cache))
    _raises(ValueError, "tokens of generate", lambda: _cache().allocate_sequence("a"))


def _batch_size() -> None:
    cache = _cache()
    _raises(ValueError, r"holds 2 sequences, not 3; batch_repeat_interleave.*reset\(\)", lambda: _pass(cache, rows=3))


def _growth() -> None:
    cache = _cache(max_pages=6)
    _raises(PagesExhaustedError, "PQC001.*max_pages=", lambda: _pass(cache, count=100))


def _forced_kernel() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_PQCACHE_KERNEL", "tuned")
        _raises(NoKernelError, "PQC002", _cache)


def _other_model() -> None:
    book = Codebook(torch.zeros(1, 16, 3).half(), torch.zeros(1, 16, 2).half())
    _raises(ValueError, "3 numbers fits no keys of 16.*another model", lambda: PagedPQCache(build("qwen3").config, book))


def _pickled_codebook() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"layers.0.keys": torch.zeros(1)}, f"{folder}/codebook.pt")
        _raises(FileNotFoundError, "codebook.safetensors", lambda: Codebook.from_pretrained(folder))


def _other_layers() -> None:
    for name, reason in (("gemma3", "sliding window"), ("qwen3_next", "recurrent state"), ("llama4", "chunks")):
        stats = _cache(name).stats()
        assert (stats["compressed_layers"], stats["exact_layers"]) == ([1], [0])
        assert reason in stats["engines"][0]["reason"]


def _odd_head_dim() -> None:
    config = tf.LlamaConfig(hidden_size=28, num_attention_heads=2, num_hidden_layers=1, head_dim=14, vocab_size=128)
    cache = PagedPQCache(config, num_bits=4)
    cache.update(torch.randn(1, 2, 9, 14), torch.randn(1, 2, 9, 14), 0)
    assert cache.stats()["exact_layers"] == [0]
    assert "num_subspaces" in cache.stats()["engines"][0]["reason"]


def _decoding_models() -> None:
    for name in ("reader", "deepseek_v3"):
        cache = _cache(name, compile=True)
        assert not cache.is_compileable
        assert {engine["name"] for engine in cache.stats()["engines"].values()} == {"decoded"}


def _foreign_attention() -> None:
    def mine(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    before = dict(tf.AttentionInterface._global_mapping)
    try:
        tf.AttentionInterface.register("sdpa", mine)
        cache = _cache()
        assert {engine["name"] for engine in cache.stats()["engines"].values()} == {"decoded"}
    finally:
        tf.AttentionInterface._global_mapping.update(before)


def _shown_padding() -> None:
    model, cache = build("llama"), PagedPQCache(build("llama").config, codebook_of("llama"), SMALL)
    inputs, _ = padded(2, 50)
    model.generate(**inputs, **cache_kwargs(cache), max_new_tokens=2)
    _raises(ValueError, r"columns 0 to 6 of row 1.*left padding", lambda: _pass(cache, count=1))


def _compiled_hybrids() -> None:
    assert _cache("qwen3", compile=True).is_compileable
    assert not _cache("gemma3", compile=True).is_compileable


def _compiled_offload() -> None:
    assert not _cache("qwen3", compile=True, offload=True).is_compileable


def _calibration_of_a_part() -> None:
    part = SimpleNamespace(config=build("llama").config, _tp_size=2)
    _raises(ValueError, "spread over 2 processes", lambda: calibrate(part, None, "a text"))


def _foreign_sequence() -> None:
    data = _cache().export_sequence(0)
    _raises(ValueError, "another model", lambda: PagedPQCache(build("qwen3").config, None, SMALL).import_sequence(data))
    _raises(ValueError, "page_size", lambda: PagedPQCache(build("llama").config, page_size=32).import_sequence(data))


def _other_equaliser() -> None:
    caches = [PagedPQCache(build("llama").config, None, SMALL) for _ in range(2)]
    for cache, loud in zip(caches, (1.0, 20.0), strict=True):
        cache.allocate_sequence("a")
        keys = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
        keys[..., 0] *= loud
        cache.append_tokens("a", 0, keys, keys)
    data = caches[0].export_sequence("a")
    _raises(ValueError, "equalised by", lambda: caches[1].import_sequence(data, "b"))


def _image_rows() -> None:
    text = tf.models.mllama.MllamaTextConfig(**COMMON, cross_attention_layers=[1], rope_theta=10000.0)
    cache = PagedPQCache(text, None, SMALL)
    for layer, count in ((0, 50), (1, 7)):
        cache.update(torch.zeros(1, 1, count, 16), torch.zeros(1, 1, count, 16), layer)
    _raises(NotImplementedError, "beside its text", lambda: cache.export_sequence(0))


def _several_queries() -> None:
    cache = _cache()
    before = cache.stats()["calls"].get("attend/torch", 0)
    _pass(cache, count=3)
    assert cache.stats()["calls"].get("attend/torch", 0) == before
    assert cache.stats()["calls"]["dense/torch"] > 0


def _kernel_shapes() -> None:
    from hf_pqcache.backends import dispatch, launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.jit, "why_unavailable", lambda: None)
        patch.setattr(torch.version, "cuda", "12.8")
        patch.setattr(launch, "device_of", lambda index: launch.Device((9, 0), 132, 232448))
        gpu, half = torch.device("cuda", 0), torch.float16
        codes = dispatch.point(4, 128)
        unserved = ((512, 512, 4, half), (128, 64, 4, half), (128, 128, 17, half), (128, 128, 4, torch.float32))
        assert dispatch.select((128, 128), codes, 4, half, gpu).name == "tuned"
        for head_dim, value_dim, group, dtype in unserved:
            assert dispatch.select((head_dim, value_dim), codes, group, dtype, gpu).name == "torch"


ENTRIES = (
    Entry(
        "pickling a cache",
        "`TypeError`",
        "it is memory of one process, made for one model; `copy.deepcopy` copies it, and codebooks are what to save",
        _pickle,
    ),
    Entry(
        "assigning `layer.keys` or `layer.values`, but right after a prompt's attention, or to drop the newest tokens",
        "`AttributeError`",
        "tokens become codes once, when they are new; later assignments would be quantized twice",
        _assignment,
    ),
    Entry(
        "pruning a padded batch",
        "`ValueError`",
        "masks tell columns, and what a head keeps stands in another column than where it was",
        _pruned_padding,
    ),
    Entry(
        "pruning a prompt that `generate` passes in pieces (`prefill_chunk_size`); two presses at once",
        "`ValueError`",
        "a press needs a prompt whole",
        _pruned_pieces,
    ),
    Entry(
        "`crop` into a pruned prompt; assisted decoding over one, whose first pass is longer than the prompt",
        "`ValueError`",
        "each head kept other tokens, so none is the last",
        _pruned_crop,
    ),
    Entry(
        "presses that do more than compress a prompt once: that prune while decoding, mask heads, or run passes of their own",
        "`ValueError`",
        "pages hold as many tokens of all heads, and are not written again",
        _more_than_a_press,
    ),
    Entry(
        "`layer.offload()`, `layer.prefetch()`",
        "`NotImplementedError`",
        "layers share their pages, so none of them moves to the host as a whole",
        _offload,
    ),
    Entry(
        "`crop` with a positive number",
        "`ValueError`",
        "transformers has changed its meaning from tokens to keep to tokens to remove; negative ones are clear",
        _crop,
    ),
    Entry(
        "one cache for an encoder-decoder model",
        "`ValueError`",
        "such a model has two attentions in each layer: pass `EncoderDecoderCache(PagedPQCache(...), DynamicCache(...))`",
        _encoder_decoder,
    ),
    Entry(
        "`generate` on a cache of `allocate_sequence`, and the reverse",
        "`ValueError`",
        "the rows of `generate` advance together, sequences each by itself; `reset()` changes from one to the other",
        _mixed_use,
    ),
    Entry(
        "another batch size while there are tokens",
        "`ValueError`",
        "rows are sequences; `reset()`, or `batch_repeat_interleave` and `batch_select_indices`, change their number",
        _batch_size,
    ),
    Entry(
        "more than `max_pages` pages",
        "`PQC001`",
        "whoever sets a limit wants it kept; without `max_pages` there is none but memory",
        _growth,
    ),
    Entry(
        "a kernel forced by `HF_PQCACHE_KERNEL` that does not serve",
        "`PQC002`",
        "who forces a kernel measures it, and must not measure another; nothing is refused where none is forced",
        _forced_kernel,
    ),
    Entry(
        "a codebook whose subspaces do not cut the model's heads",
        "`ValueError`",
        "its codes would stand for other keys and values, and the answer would be noise",
        _other_model,
    ),
    Entry(
        "`calibrate` on a model whose heads are spread over processes",
        "`ValueError`",
        "a codebook holds the heads of all; one made in a single process serves any number of them",
        _calibration_of_a_part,
    ),
    Entry(
        "codebooks as pickles",
        "`FileNotFoundError`",
        "unpickling a file runs what is in it; codebooks are safetensors and JSON",
        _pickled_codebook,
    ),
    Entry(
        "importing a sequence of another model, of other settings, dtype or (with `model=`) weights",
        "`ValueError`",
        "its numbers would mean nothing; the message says what differs",
        _foreign_sequence,
    ),
    Entry(
        "importing a sequence beside others whose keys were equalised otherwise",
        "`ValueError`",
        "one equaliser serves all pages of a layer; caches that begin with the same imported sequence share it",
        _other_equaliser,
    ),
    Entry(
        "exporting rows of models that attend to an image beside their text, or copy layers for themselves",
        "`NotImplementedError`",
        "such layers hold what no position of the text tells",
        _image_rows,
    ),
    Entry(
        "sliding-window, chunked, linear-attention layers",
        "stay transformers' own, exact",
        "they keep a bounded number of tokens or none; `stats()` names them",
        _other_layers,
    ),
    Entry(
        "a head_dim that cannot be cut into 8 to head_dim / 2 equal parts",
        "the layer stays exact",
        "there is nothing to cut; asked for by `num_subspaces`, it is a `ValueError`",
        _odd_head_dim,
    ),
    Entry(
        "models that read keys themselves (Falcon, Bloom in transformers 5.24) or expand them (DeepSeek's latent attention)",
        "decoded at every step, not compiled",
        "what is in the cache is not what transformers' attention interface is given",
        _decoding_models,
    ),
    Entry(
        "attention functions that transformers did not write, or wrappers around its own; attention weights",
        "decoded at every step",
        "they are called as they are, with tensors: what they compute is theirs to know",
        _foreign_attention,
    ),
    Entry(
        "an attention mask that shows what was left padding before",
        "`ValueError`",
        "padding is not stored; a mask that hides tokens for now is no padding while positions count them",
        _shown_padding,
    ),
    Entry(
        "compiled decode steps of models with other layers than full attention",
        "run eagerly",
        "transformers' own sliding layers count in Python, which a graph cannot",
        _compiled_hybrids,
    ),
    Entry(
        "compiled decode steps with `offload=True`",
        "run eagerly",
        "which pages move is the host's choice, and a captured graph makes none",
        _compiled_offload,
    ),
    Entry(
        "several query tokens over a past (a second turn, assisted decoding)",
        "the past is decoded, then plain attention",
        "kernels serve one query token, where the time goes",
        _several_queries,
    ),
    Entry(
        "float32, head_dim above 256 or no multiple of 4, keys and values that differ, over 16 query heads for a KV head",
        "plain torch",
        "no kernel is made for them; `stats()` says which backend serves a layer and why",
        _kernel_shapes,
    ),
)


def table() -> str:
    """All entries as Markdown."""
    rows = [f"| {entry.what} | {entry.answer} | {entry.why} |" for entry in ENTRIES]
    return "\n".join(["| what | answer | why |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
