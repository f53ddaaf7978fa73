"""Models beyond full attention: what can be compressed is, the rest runs as transformers' own cache would run it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import EAGER_ONLY, SMALL, VOCABULARY, asks_for_attention, build, codebook_of, padded, tokens
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
#: Architecture -> (layers that are compressed, start of the reason given for each other layer).
KINDS = {
    "mistral_sliding": ([], {0: "keeps no more than 8 tokens", 1: "keeps no more than 8 tokens"}),
    "gemma2": ([1], {0: "keeps no more than 8 tokens"}),
    "gemma3": ([1], {0: "keeps no more than 8 tokens"}),
    "gpt_oss": ([1], {0: "keeps no more than 8 tokens"}),
    "llama4": ([1], {0: "keeps no more than 16 tokens"}),
    "qwen3_next": ([1], {0: "keeps a recurrent state"}),
    "falcon_h1": ([0, 1], {}),
}


def generate(model: Any, cache: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **cache_kwargs(cache), **(settings | options))
    return out.sequences, torch.stack(out.logits)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


def implementation_of(name: str) -> str:
    return "eager" if name in EAGER_ONLY else "sdpa"


@pytest.mark.parametrize("name", KINDS)
def test_layers_that_are_not_compressed_say_why(name: str) -> None:
    model, (compressed, reasons) = build(name, implementation_of(name)), KINDS[name]
    cache = PagedPQCache(model.config, codebook_of(name), SMALL)
    inputs, _ = padded(2, 50)
    got = generate(model, cache, inputs)
    stats = cache.stats()
    assert stats["compressed_layers"] == compressed
    assert stats["exact_layers"] == list(reasons)
    for layer, reason in reasons.items():
        assert stats["engines"][layer]["name"] == "exact"
        assert stats["engines"][layer]["reason"].startswith(reason)
    if not compressed:
        assert_same(got, generate(model, DynamicCache(config=model.config), inputs))


@torch.no_grad()
def test_a_recurrent_state_beside_compressed_tokens_goes_where_they_go() -> None:
    """Falcon-H1 has both in each layer; a cache whose tokens turn out unfit for pages keeps the state it has by then."""
    model, ids = build("falcon_h1"), tokens(2, 40)
    caches = [PagedKVCache(model.config, page_size=16), DynamicCache(config=model.config)]
    for cache in caches:
        model(ids, **cache_kwargs(cache))
    ours, theirs = (cache.layers[1] for cache in caches)
    torch.testing.assert_close(ours.recurrent_states[0], theirs.recurrent_states[0])
    assert (caches[0].has_previous_state(1), ours.is_croppable) == (True, False)
    twin = copy.deepcopy(caches[0])
    for cache in (caches[0], caches[1], twin):
        cache.reorder_cache(torch.tensor([1, 0]))
    steps = [model(tokens(2, 1), **cache_kwargs(cache)).logits for cache in (*caches, twin)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps[2], steps[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="has no batch_repeat_interleave"):
        twin.batch_repeat_interleave(2)
    assert twin.batch_size == 2
    caches[0].reset()
    assert not caches[0].has_previous_state(1)


def test_a_recurrent_state_stays_where_the_tokens_beside_it_do_not_fit_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, _) = build("falcon_h1"), padded(2, 50)
    monkeypatch.setattr(PagedPQCache, "_why_unfit", lambda self, keys, values: "a test says so")
    cache = PagedPQCache(model.config, page_size=16)
    assert_same(generate(model, cache, inputs), generate(model, DynamicCache(config=model.config), inputs))
    assert cache.stats()["exact_layers"] == [0, 1]


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_and_values_read_the_same_codes(name: str) -> None:
    model, book = build(name), codebook_of(name)
    inputs, starts = padded(2, 50)
    cache = PagedPQCache(model.config, book, SMALL)
    assert_same(generate(model, cache, inputs), generate(model, ReferenceCache(model.config, book, SMALL, starts), inputs))
    assert cache.stats()["compressed_layers"] == [1]


@pytest.mark.parametrize("name", ["reader", "gptj", "falcon", "deepseek_v3"])
def test_models_that_read_keys_themselves_get_them_decoded(name: str) -> None:
    """They never show us their mask, so their padding is stored like any token; the mask hides it from attention.

    A released model that goes through the attention interface of this transformers is fused like others.
    """
    model, book = build(name, implementation_of(name)), codebook_of(name)
    is_decoded = name in ("reader", "deepseek_v3") or not asks_for_attention(model)
    inputs, starts = padded(2, 50)
    cache = PagedPQCache(model.config, book, SMALL)
    reference = ReferenceCache(model.config, book, SMALL, [0] if is_decoded else starts)
    assert_same(generate(model, cache, inputs), generate(model, reference, inputs))
    stats = cache.stats()
    assert stats["pages_used"] > 0
    assert ("attend/torch" not in stats["calls"]) == is_decoded
    assert ({engine["name"] for engine in stats["engines"].values()} == {"decoded"}) == is_decoded


def test_keys_and_values_may_differ_in_head_dim() -> None:
    book = codebook_of("deepseek_v3")
    assert book is not None
    model = build("deepseek_v3")
    ours, reference = (kind(model.config, None, SMALL) for kind in (PagedPQCache, ReferenceCache))
    assert_same(*(generate(model, cache, {"input_ids": tokens(2, 50)}) for cache in (ours, reference)))
    assert ours.stats()["pages_used"] > 0


def test_a_head_dim_that_cannot_be_cut_stays_exact() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = tf.LlamaConfig(**sizes, vocab_size=VOCABULARY, intermediate_size=16, eos_token_id=None, pad_token_id=0)
    model = tf.LlamaForCausalLM(config).eval()
    cache, inputs = PagedPQCache(model.config, page_size=16), padded(2, 60)[0]
    assert_same(generate(model, cache, inputs), generate(model, DynamicCache(config=model.config), inputs))
    stats = cache.stats()
    assert stats["exact_layers"] == [0, 1]
    assert "keys of 6 numbers" in stats["engines"][0]["reason"]
    assert stats["tokens"] == 71


def encoder_decoder(name: str) -> Any:
    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": None}
    if name == "bart":
        sides = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIDES.items()}
        config = tf.BartConfig(
            d_model=32, **sides, **ids, bos_token_id=1, forced_eos_token_id=None, max_position_embeddings=256
        )
        return tf.BartForConditionalGeneration(config).eval()
    config = tf.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, **ids)
    return tf.T5ForConditionalGeneration(config).eval()


SIDES = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder_models_compress_what_the_decoder_has_written(name: str) -> None:
    model, inputs = encoder_decoder(name), {"input_ids": tokens(2, 20)}
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "num_beams": 2}
    caches = [
        EncoderDecoderCache(first, DynamicCache(config=model.config.get_text_config(decoder=True)))
        for first in (PagedPQCache(model.config, None, SMALL), ReferenceCache(model.config, None, SMALL))
    ]
    assert_same(*(generate(model, cache, inputs, **options) for cache in caches))
    assert caches[0].self_attention_cache.stats()["pages_used"] > 0


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_bare_cache_for_an_encoder_decoder_model_is_refused(name: str) -> None:
    model, inputs = encoder_decoder(name), {"input_ids": tokens(2, 20)}
    with pytest.raises(ValueError, match=r"EncoderDecoderCache\(PagedPQCache"):
        generate(model, PagedPQCache(model.config), inputs)
    with pytest.raises(ValueError, match=r"EncoderDecoderCache\(PagedPQCache"):
        model(**inputs, decoder_input_ids=tokens(2, 3), **cache_kwargs(PagedPQCache(model.config)))


@torch.no_grad()
@pytest.mark.parametrize("make", [PagedKVCache, PagedPQCache])
def test_a_decoder_may_have_fewer_layers_than_the_cache_that_its_config_makes(make: Any) -> None:
    """DynamicCache has as many as the encoder: Distil-Whisper's has 32, its decoder 2."""
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIDES.items()}
    config = tf.BartConfig(d_model=32, **{**sides, "encoder_layers": 4}, vocab_size=VOCABULARY, is_encoder_decoder=False)
    model = tf.BartForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    cache, inputs = make(model.config, page_size=16), padded(2, 40)[0]
    assert len(cache) == 4
    assert_same(generate(model, cache, inputs), generate(model, DynamicCache(config=model.config), inputs))
    assert cache.get_seq_length() == 51
    assert cache.stats()["compressed_layers"] == [0, 1]


def captioner() -> tuple[Any, dict[str, Tensor]]:
    """(BLIP, inputs): its decoder looks at an image in every layer, and its config tells of no encoder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "sep_token_id": None, "pad_token_id": 0}
    text = {**sizes, **ids, "encoder_hidden_size": 32, "max_position_embeddings": 64}
    config = tf.BlipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=32)
    model = tf.BlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 2):
            parameter.mul_(6.0)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": tokens(2, 6)}


def test_a_model_that_makes_a_second_cache_for_an_image_does_so_beside_ours() -> None:
    model, inputs = captioner()
    text = model.config.text_config
    expected = model.generate(**inputs, max_new_tokens=20)
    ours = PagedKVCache(text, page_size=16)
    for cache in (ours, EncoderDecoderCache(PagedKVCache(text, page_size=16), DynamicCache(config=text))):
        assert torch.equal(model.generate(**inputs, **cache_kwargs(cache), max_new_tokens=20), expected)
    assert ours.get_seq_length() > 20


def test_two_attentions_that_the_config_does_not_tell_of_are_seen_in_the_first_pass() -> None:
    cache, keys = PagedKVCache(build("llama").config, page_size=16), torch.randn(2, 2, 9, 16)
    for layer in (0, 0, 1):
        cache.update(keys, keys, layer)
    with pytest.raises(ValueError, match=r"EncoderDecoderCache\(PagedPQCache"):
        cache.update(keys, keys, 1)


@pytest.mark.parametrize("make", [PagedKVCache, PagedPQCache])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_assisted_decoding_of_encoder_decoder_models(name: str, make: Any) -> None:
    model, inputs = encoder_decoder(name), {"input_ids": tokens(1, 20)}
    assistant = copy.deepcopy(model)
    for parameter in assistant.parameters():
        parameter.data.add_(0.1 * parameter.std() if parameter.numel() > 1 else 0)
    config = model.config.get_text_config(decoder=True)
    options = {"assistant_model": assistant, "max_new_tokens": 30, "min_new_tokens": 30}
    caches = [
        EncoderDecoderCache(first, DynamicCache(config=config))
        for first in (make(model.config, page_size=16), DynamicCache(config=config))
    ]
    assert_same(*(generate(model, cache, inputs, **options) for cache in caches))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_pass_that_is_tried_again_is_not_taken_for_two_attentions(times: int) -> None:
    model, ids = build("llama"), tokens(2, 24)
    cache = PagedKVCache(model.config, page_size=16)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids[:, :20], **cache_kwargs(cache))
        for _ in range(times):
            hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 20:], **cache_kwargs(cache))
            hook.remove()
        got, expected = model(ids[:, 20:], **cache_kwargs(cache)).logits, model(ids).logits[:, 20:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_that_was_reset_takes_another_number_of_rows() -> None:
    model, book = build("llama"), codebook_of("llama")
    cache = PagedPQCache(model.config, book, SMALL)
    generate(model, cache, {"input_ids": tokens(3, 50)})
    with pytest.raises(ValueError, match=r"holds 3 sequences, not 2.*reset"):
        model(tokens(2, 4), **cache_kwargs(cache))
    cache.reset()
    inputs, starts = padded(2, 50)
    assert_same(generate(model, cache, inputs), generate(model, ReferenceCache(model.config, book, SMALL, starts), inputs))
    assert cache.batch_size == 2
