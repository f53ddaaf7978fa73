"""PQConfig: every number that shapes a cache, and the sizes that follow from it. Knows no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from reprlib import repr as short
from typing import Any, Literal, NamedTuple

Side = Literal["key", "value"]

#: Codes are indices of one byte at most; fewer than 16 centroids describe a subspace too coarsely to be of use.
MIN_BITS, MAX_BITS = 4, 8
#: bits -> numbers that one code stands for and bits of that code, of keys and of values. Keys need them more: their errors
#: move scores, which the softmax blows up (eval/RESULTS.md has the splits that were measured).
OPERATING_POINTS = {4: ((2, 8), (2, 8)), 3: ((2, 7), (2, 5)), 2: ((2, 5), (4, 6))}
#: Most tokens that a pool may have room for: kernels count them in 32 bits.
MAX_TOKENS = (1 << 31) - 1


class CodeShape(NamedTuple):
    """How keys, or values, of a layer are coded: num_subspaces codes of num_bits bits for each vector."""

    num_subspaces: int
    num_bits: int


@dataclass(frozen=True)
class PQConfig:
    """Shape of a product-quantized cache.

    Attributes:
        bits: the operating point, 4, 3 or 2 bits of code a number, keys and values together; the settings of codes below
            decide where they are given.
        num_subspaces: M, the number of parts that a key is cut into (Jégou et al. 2011, section II-B). A divisor of its
            head_dim from 8 to head_dim. None goes by `bits`.
        num_bits: bits of one code of a key; 2**num_bits centroids. 4 to 8. None goes by `bits`.
        value_subspaces, value_bits: the same for values. None is as for keys where those are given, else goes by `bits`.
        page_size: tokens a page holds; a multiple of 16 from 16 to 512.
        max_pages: most pages that all sequences of the cache may have together. None: as many as there is memory for.
            Memory is taken as tokens come, whatever this says.
        sink_tokens: first tokens of every sequence that stay exact (Xiao et al. 2023, attention sinks).
        extended_residual: newest tokens that always stay exact; older ones leave this window a page at a time.
    """

    bits: int = 4
    num_subspaces: int | None = None
    num_bits: int | None = None
    value_subspaces: int | None = None
    value_bits: int | None = None
    page_size: int = 64
    max_pages: int | None = None
    sink_tokens: int = 4
    extended_residual: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{field.name}={short(value)} must be an integer, got {type(value).__name__}")
            if abs(value) > MAX_TOKENS:
                raise ValueError(f"{field.name}={short(value)} is out of range; kernels count in 32 bits")
        if self.bits not in OPERATING_POINTS:
            raise ValueError(f"bits={self.bits} is no operating point; use one of {sorted(OPERATING_POINTS)}")
        for name in ("num_bits", "value_bits"):
            if (value := getattr(self, name)) is not None and not MIN_BITS <= value <= MAX_BITS:
                raise ValueError(f"{name}={value} is out of range; use {MIN_BITS} to {MAX_BITS}")
        if self.page_size % 16 or not 16 <= self.page_size <= 512:
            raise ValueError(f"page_size={self.page_size} must be a multiple of 16 from 16 to 512; the default is 64")
        if self.max_pages is not None and self.max_pages < 1:
            raise ValueError(f"max_pages={self.max_pages} must be at least 1")
        if self.max_pages is not None and self.max_pages * self.page_size > MAX_TOKENS:
            raise ValueError(
                f"max_pages={self.max_pages} pages of {self.page_size} tokens are more than {MAX_TOKENS} tokens, which is "
                f"what kernels can count; use max_pages={MAX_TOKENS // self.page_size} or less"
            )
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens={self.sink_tokens} must not be negative")
        if self.extended_residual < 1:
            raise ValueError(
                f"extended_residual={self.extended_residual} must be at least 1: the token being decoded stays exact"
            )

    def check_room(self, expected_tokens: int) -> None:
        """Raises ValueError if one sequence of `expected_tokens` needs more pages than there are."""
        pages = self.pages_of(expected_tokens)
        if self.max_pages is not None and pages > self.max_pages:
            raise ValueError(
                f"expected_tokens={expected_tokens} fill {pages} pages of {self.page_size} tokens and max_pages="
                f"{self.max_pages}; use max_pages={pages} or more, times the sequences that there are at once"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PQConfig:
        """Build from a plain dict, as read from YAML or JSON. Raises ValueError naming the keys it does not know."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown cache settings {short(unknown)}; known ones are {sorted(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes: Any) -> PQConfig:
        return replace(self, **changes)

    @property
    def window_slots(self) -> int:
        """Ring slots of the exact window: a full page leaves when the last one is taken, so `extended_residual` stay."""
        return self.extended_residual + self.page_size

    def coded_tokens(self, length: int) -> int:
        """How many of a sequence's first `length` tokens are stored as codes: whole pages, between sinks and window."""
        return max(0, length - self.sink_tokens - self.extended_residual) // self.page_size * self.page_size

    def pages_of(self, length: int) -> int:
        """Pages that a sequence of `length` tokens fills."""
        return self.coded_tokens(length) // self.page_size

    def fitting_pages(self, length: int) -> int:
        """Pages that a sequence of up to `length` tokens needs at most, within `max_pages`; at least one."""
        pages = max(1, -(-length // self.page_size))
        return pages if self.max_pages is None else min(pages, self.max_pages)

    def codes(self, which: Side, head_dim: int) -> CodeShape:
        """How keys or values of `head_dim` numbers are coded. Raises ValueError naming the legal choices."""
        width, bits = OPERATING_POINTS[self.bits][which == "value"]
        wanted, num_bits = self.num_subspaces, self.num_bits
        if which == "value":
            wanted = wanted if self.value_subspaces is None else self.value_subspaces
            num_bits = num_bits if self.value_bits is None else self.value_bits
        legal = [m for m in range(8, head_dim + 1) if head_dim % m == 0]
        if (m := wanted) is None:
            usual = [m for m in legal if 2 * m <= head_dim or which == "value"]  # codes of one number save too little for keys
            m = max((m for m in usual if m <= head_dim // width), default=min(usual, default=head_dim // width))
        if m not in legal:
            name = "num_subspaces" if which == "key" or self.value_subspaces is None else "value_subspaces"
            raise ValueError(f"{name}={m} does not cut {which}s of {head_dim} numbers into equal parts; use one of {legal}")
        return CodeShape(m, bits if num_bits is None else num_bits)


def choose_page_size(page_size: int | str, expected_tokens: int | None) -> int:
    """`page_size` itself or, where it is "auto", the one for sequences of `expected_tokens`.

    That is the largest of 16, 32, 64, 128 and 256 up to a 64th of the length. Until a page is full its tokens are kept
    exactly, which takes four times the bytes of 4-bit codes: half a page on average, so 3 % of a sequence's codes at
    most from 1024 tokens on. Larger pages make shorter page tables and fewer, longer copies.

    Raises ValueError for "auto" without a length, for a length below 1, and for any other word.
    """
    if not isinstance(page_size, str):
        return page_size
    if page_size != "auto":
        raise ValueError(f'page_size={page_size!r} is neither a number of tokens nor "auto"')
    if expected_tokens is None or expected_tokens < 1:
        raise ValueError(
            'page_size="auto" goes by the length of your sequences: pass expected_tokens=, prompt and new tokens together '
            f"(got {expected_tokens})"
        )
    return max(16, min(256, 1 << (expected_tokens // 64 or 1).bit_length() - 1))
