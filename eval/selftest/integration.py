"""Phase 3, integration: `generate` of the embedded small model under our caches against plain computations."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from hf_pqcache.cache.caches import PagedKVCache, PagedPQCache
from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.codebook.calibrate import calibrate
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.eval.selftest.checks import Check, CheckSkipped, Machine, expect, expect_close, expect_equal
from hf_pqcache.models.names import cache_kwargs

#: Pages leave the window every 16 tokens, and most of the prompts below are codes. The shape has a tuned kernel.
SETTINGS = PQConfig(num_subspaces=32, num_bits=6, page_size=16, extended_residual=32, max_pages=256)
CALIBRATION_TOKENS, NEW_TOKENS = 1024, 12
#: With the new tokens, long enough for a page to leave the window while decoding.
PROMPT_TOKENS = 156
#: Relative L2 distance of logits from plain computation's.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass(frozen=True, eq=False)
class Setup:
    """The embedded model on a device, and token ids (N) of the embedded text to make prompts of."""

    model: Any
    tokenizer: Any
    ids: Tensor

    @property
    def config(self) -> Any:
        return self.model.config

    def prompt(self, rows: int = 2, tokens: int = PROMPT_TOKENS) -> dict[str, Tensor]:
        ids = torch.stack([self.ids[5000 + 500 * row :][:tokens] for row in range(rows)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def padded(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        inputs = self.prompt(len(lengths), max(lengths))
        for row, length in enumerate(lengths):
            inputs["attention_mask"][row, : max(lengths) - length] = 0
        return inputs

    def generate(self, cache: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        """(tokens (B, n), logits (steps, B, vocabulary))."""
        fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}
        fixed |= {"output_logits": True, "return_dict_in_generate": True}
        out = self.model.generate(**inputs, **cache_kwargs(cache), **(fixed | options))
        return out.sequences, torch.stack(out.logits)

    def coded(self, **options: Any) -> PagedPQCache:
        return PagedPQCache(self.config, pq_config=SETTINGS, **({"compile": False} | options))

    def reference(self, starts: Sequence[int] = (0,)) -> ReferenceCache:
        return ReferenceCache(self.config, pq_config=SETTINGS, starts=starts)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@cache
def setup(device: torch.device) -> Setup:
    """float32 on a CPU; float16 on a GPU, where the kernels want it."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with _quiet_loading():
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0].to(device)
    return Setup(model, tokenizer, ids)


def agree(what: str, ours: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> None:
    """Logits are close up to the first token that differs; in float32 no token differs."""
    bound = BOUNDS[ours[1].dtype]
    steps = ours[1].shape[0]
    if ours[1].dtype == torch.float32:
        expect_equal(f"tokens of {what}", ours[0], plain[0])
    for step in range(steps):
        expect_close(f"logits of {what}, step {step}", ours[1][step], plain[1][step], bound)
        if not torch.equal(ours[0][:, step - steps], plain[0][:, step - steps]):
            break


def uncompressed(machine: Machine) -> str:
    """While all tokens are in the exact window, and in exact pages, `generate` is that of DynamicCache."""
    s = setup(machine.device)
    for inputs in (s.prompt(), s.padded([PROMPT_TOKENS, 96])):
        plain = s.generate(DynamicCache(config=s.config), inputs)
        cache = s.coded(extended_residual=256)
        agree("a cache that has coded nothing", s.generate(cache, inputs), plain)
        expect_equal("pages in use", cache.stats()["pages_used"], 0)
        exact = PagedKVCache(s.config, page_size=16, max_pages=64)
        agree("PagedKVCache", s.generate(exact, inputs), plain)
        expect(exact.stats()["pages_used"] > 0, "tokens in pages", "none")
    return "equals DynamicCache, also with left padding"


def compressed(machine: Machine) -> str:
    """Attention over codes is that over the decoded keys and values."""
    s = setup(machine.device)
    for inputs, starts in ((s.prompt(), (0,)), (s.padded([PROMPT_TOKENS, 96]), (0, PROMPT_TOKENS - 96))):
        cache = s.coded()
        agree("a cache of codes", s.generate(cache, inputs), s.generate(s.reference(starts), inputs))
        stats = cache.stats()
        expect(stats["pages_used"] > 0, "tokens that are codes", "none")
        expect(stats["bytes"]["codes"] < stats["bytes_fp16"], "fewer bytes of codes than fp16 would take", stats["bytes"])
    return "equals decoding and plain attention, also with left padding"


def offloaded(machine: Machine) -> str:
    """Pages in host memory: the same numbers, and less of them on the device."""
    s = setup(machine.device)
    plain, cache = s.coded(), s.coded(offload=True)
    expected, got = s.generate(plain, s.prompt()), s.generate(cache, s.prompt())
    expect_equal("tokens with pages in host memory", got[0], expected[0])
    expect_equal("logits with pages in host memory", got[1], expected[1])
    expect(cache.stats()["pages_used"] > 0, "tokens that are codes", "none")
    return "equals pages on the device, bit by bit"


def beams(machine: Machine) -> str:
    s = setup(machine.device)
    cache = s.coded()
    ours, plain = (s.generate(c, s.prompt(), num_beams=3, num_return_sequences=3) for c in (cache, s.reference()))
    if s.model.dtype == torch.float32:
        expect_equal("tokens of beam search", ours[0], plain[0])
    expect_close("logits of beam search, first step", ours[1][0], plain[1][0], BOUNDS[s.model.dtype])
    shared = [cache.storage.layers.allocator.references(page) for page in cache.storage.layers.table.rows[0]]
    expect(max(shared) > 1, "pages that beams share", shared)
    return "equals decoding and plain attention; beams share pages"


def cropping(machine: Machine) -> str:
    """Prompt lookup guesses tokens and takes wrong ones back; and by hand across pages into the exact window."""
    s = setup(machine.device)
    inputs = s.prompt(1)
    half = PROMPT_TOKENS // 2
    inputs["input_ids"][:, half:] = inputs["input_ids"][:, :half].clone()  # something to find
    ours, plain = (s.generate(c, inputs, prompt_lookup_num_tokens=4) for c in (s.coded(), s.reference()))
    agree("prompt lookup", ours, plain)
    caches = (s.coded(), s.reference())
    logits = []
    for one in caches:
        with torch.no_grad():
            s.model(s.prompt()["input_ids"], **cache_kwargs(one))
            one.crop(-70)
            logits.append(s.model(s.prompt(2, 160)["input_ids"][:, PROMPT_TOKENS - 70 :], **cache_kwargs(one)).logits)
    expect_close("logits after a crop by 70 tokens", logits[0], logits[1], bound=BOUNDS[s.model.dtype])
    return "prompt lookup, and a crop across pages"


def turns(machine: Machine) -> str:
    """A conversation: the same cache again with a longer prompt; and a deep copy of a prefix."""
    s = setup(machine.device)
    results = []
    for one in (s.coded(), s.reference()):
        inputs, parts = s.prompt(2, 60), []
        for turn in range(3):
            if turn == 1:
                s.generate(copy.deepcopy(one), inputs, max_new_tokens=3)  # must leave the cache as it is
            sequences, logits = s.generate(one, inputs, max_new_tokens=8)
            parts.append(logits)
            ids = torch.cat([sequences, s.prompt(2, 40)["input_ids"]], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        results.append((sequences, torch.cat(parts)))
    if s.model.dtype == torch.float32:
        expect_equal("tokens of three turns", results[0][0], results[1][0])
        expect_close("logits of three turns", results[0][1], results[1][1], BOUNDS[s.model.dtype])
    else:
        expect_close("logits of the first turn", results[0][1][0], results[1][1][0], BOUNDS[s.model.dtype])
    return "three turns on one cache, and a deep copy that leaves it alone"


def codebook_files(machine: Machine) -> str:
    """A codebook of the model's own that was saved and loaded gives the same tokens; a damaged one is refused."""
    s = setup(machine.device)
    book = calibrate(s.model, None, s.ids.cpu(), SETTINGS, num_tokens=CALIBRATION_TOKENS, window=1024, progress=False)
    inputs = s.prompt(1)
    with tempfile.TemporaryDirectory() as folder:
        book.save_pretrained(folder)
        loaded = Codebook.from_pretrained(folder)
        expect_equal("fingerprint of the loaded codebook", loaded.fingerprint, book.fingerprint)
        own = PagedPQCache(s.config, book, SETTINGS, compile=False)
        cache = PagedPQCache.from_pretrained(folder, s.model, compile=False, **_window())
        expect_equal("tokens with the loaded codebook", s.generate(cache, inputs)[0], s.generate(own, inputs)[0])
        with open(f"{folder}/codebook.safetensors", "r+b") as file:
            file.truncate(100)
        try:
            Codebook.from_pretrained(folder)
        except ValueError:
            return "learnt, saved, loaded, a damaged one refused"
    expect(False, "ValueError for a file that was cut short", "no error")
    return ""


def _window() -> dict[str, Any]:
    """The settings that are not a codebook's own."""
    return {name: getattr(SETTINGS, name) for name in ("page_size", "sink_tokens", "extended_residual", "max_pages")}


def compiled(machine: Machine) -> str:
    """`generate` compiles the decode step by itself: CUDA graphs with our kernels in them."""
    if machine.device.type != "cuda":
        raise CheckSkipped("no GPU; transformers compiles for accelerators only")
    s = setup(machine.device)
    cache = s.coded(compile=None)
    if not cache.is_compileable:
        raise CheckSkipped("no kernels here, so decode steps are not compiled")
    plain = s.generate(s.coded(), s.prompt())
    agree("compiled decode steps", s.generate(cache, s.prompt()), plain)
    cache.reset()
    agree("compiled decode steps after reset", s.generate(cache, s.prompt()), plain)
    expect_equal("length after compiled steps", cache.get_seq_length(), PROMPT_TOKENS + NEW_TOKENS - 1)
    return "compiled equals eager, also after reset"


CHECKS = (
    Check("generate, nothing coded", 3, uncompressed),
    Check("generate, coded", 3, compressed),
    Check("generate, pages in host memory", 3, offloaded),
    Check("beam search", 3, beams),
    Check("crop", 3, cropping),
    Check("turns", 3, turns),
    Check("codebook files", 3, codebook_files),
    Check("compiled decode steps", 3, compiled),
)
