"""Token ids become text as they arrive: never half a character, never anything past a stop string; knows no request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What decoders put where bytes are no character, or not yet one.
BROKEN = "�"


class Detokenizer:
    """Text of a growing list of tokens. All parts together are what the tokenizer makes of the whole list.

    Decoders look at neighbours (spaces, bytes of one character), so each token is decoded behind the part before it, as
    text-generation-inference and vLLM do.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.begin = self.told = 0
        self.context = ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.ids.append(token)
        text = self._decode(self.ids[self.begin :])
        if len(text) <= len(self.context) or text.endswith(BROKEN):
            return ""
        new = text[len(self.context) :]
        self.begin, self.told = self.told, len(self.ids)
        self.context = self._decode(self.ids[self.begin : self.told])
        return new

    def flush(self) -> str:
        """What is left when no token follows, broken characters included."""
        text = self._decode(self.ids[self.begin :])[len(self.context) :]
        self.begin = self.told = len(self.ids)
        self.context = ""
        return text


class TextStream:
    """The text of an answer up to its first stop string; `is_stopped` says that there was one.

    Args:
        stops: strings that end the answer and are no part of it. min_tokens: before so many, none of them is looked for.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.stops, self.min_tokens = tuple(stops), min_tokens
        self.held = ""
        self.count = 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What may be shown after one more token. Nothing after a stop string."""
        self.count += 1
        return "" if self.is_stopped else self._release(self.detokenizer.add(token), is_last=False)

    def flush(self) -> str:
        """What is left when the answer has ended by itself."""
        return "" if self.is_stopped else self._release(self.detokenizer.flush(), is_last=True)

    def _release(self, new: str, is_last: bool) -> str:
        text, self.held = self.held + new, ""
        if self.count < self.min_tokens:
            return text
        # The one that is complete first, however the text comes; of two, the longer.
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)[1]]
        kept = 0 if is_last else self._beginning(text)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _beginning(self, text: str) -> int:
        """Characters at the end of `text` with which a stop string may begin."""
        longest = min(len(text), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
