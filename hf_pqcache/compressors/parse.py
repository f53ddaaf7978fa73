"""Presses by name, as the command line has them: "snapkv:0.5"."""

from __future__ import annotations

from hf_pqcache.compressors.expected_attention import ExpectedAttention
from hf_pqcache.compressors.knorm import Knorm
from hf_pqcache.compressors.press import ScorePress
from hf_pqcache.compressors.snapkv import SnapKV
from hf_pqcache.compressors.streaming_llm import StreamingLLM

PRESSES: dict[str, type[ScorePress]] = {
    "knorm": Knorm,
    "snapkv": SnapKV,
    "expected-attention": ExpectedAttention,
    "streaming-llm": StreamingLLM,
}


def parse(text: str) -> ScorePress:
    """ "snapkv:0.5": a name of PRESSES and the share of the prompt that goes. Raises ValueError naming the choices."""
    name, _, ratio = text.partition(":")
    if name not in PRESSES:
        raise ValueError(f"press {name!r} is unknown; use one of {tuple(PRESSES)}")
    try:
        share = float(ratio)
    except ValueError:
        raise ValueError(f"press {text!r}: give the share of tokens that goes after a colon, like {name}:0.5") from None
    return PRESSES[name](share)
