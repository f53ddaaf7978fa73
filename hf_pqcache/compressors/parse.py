"""Presses by name, as the command line has them: "snapkv:0.5", "mlp:FOLDER"."""

from __future__ import annotations

from hf_pqcache.compressors.expected_attention import ExpectedAttention
from hf_pqcache.compressors.knorm import Knorm
from hf_pqcache.compressors.mlp import MLPCompressor
from hf_pqcache.compressors.press import ScorePress
from hf_pqcache.compressors.snapkv import SnapKV
from hf_pqcache.compressors.streaming_llm import StreamingLLM

PRESSES: dict[str, type[ScorePress]] = {
    "knorm": Knorm,
    "snapkv": SnapKV,
    "expected-attention": ExpectedAttention,
    "streaming-llm": StreamingLLM,
}


#: The learnt press, whose weights are in a folder.
LEARNT = "mlp"


def parse(text: str) -> ScorePress | MLPCompressor:
    """ "snapkv:0.5": a name of PRESSES and the share of the prompt that goes; "mlp:FOLDER": one that was trained.

    Raises ValueError naming the choices, FileNotFoundError for a folder without a press.
    """
    name, _, ratio = text.partition(":")
    if name == LEARNT:
        if not ratio:
            raise ValueError(
                f"press {text!r}: give the folder that `pqcache train-compressor` made after a colon, like mlp:compressor"
            )
        return MLPCompressor.from_pretrained(ratio)
    if name not in PRESSES:
        raise ValueError(f"press {name!r} is unknown; use one of {(*PRESSES, LEARNT)}")
    try:
        return PRESSES[name](float(ratio))
    except ValueError:
        raise ValueError(
            f"press {text!r}: give the share of tokens that goes, from 0 to below 1, after a colon, like {name}:0.5"
        ) from None
