"""The model and the text that `pqcache demo` carries along; see PROVENANCE.md."""

from pathlib import Path

MODEL = Path(__file__).with_name("tiny")
TEXT = Path(__file__).with_name("articles.txt")
SEPARATOR = "<|endoftext|>"


def split_text(text: str, documents: int = 3) -> tuple[str, str]:
    """(two thirds to calibrate on, one third to evaluate), whole documents, every third one held out."""
    parts = [part.strip() for part in text.split(SEPARATOR) if part.strip()]
    if len(parts) < documents:
        cut = len(text) * 2 // 3
        return text[:cut], text[cut:]
    held_out = parts[documents - 1 :: documents]
    rest = [part for i, part in enumerate(parts) if i % documents != documents - 1]
    return f"\n{SEPARATOR}\n".join(rest), f"\n{SEPARATOR}\n".join(held_out)
