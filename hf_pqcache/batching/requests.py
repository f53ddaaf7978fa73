"""What the engine's cache knows of a request beside its blocks; no transformers, no tensors of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor


class Staging:
    """A prompt's exact keys and values until the last of it has come, so that a prompt in chunks attends as one in one piece.

    `layers[i]` are the chunks of layer i, each (keys, values) (H, T, d); `shown[i]` what a press is shown of them.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]
        self.shown: list[list[Any]] = [[] for _ in range(num_layers)]
        self.tokens = 0  # that all layers will have once the chunks under way are computed

    def copy(self) -> Staging:
        """For a fork: the same chunks so far."""
        new = Staging(len(self.layers))
        new.layers, new.tokens = [list(chunks) for chunks in self.layers], self.tokens
        new.shown = [list(chunks) for chunks in self.shown]
        return new


@dataclass(eq=False)
class Request:
    """One request that has a slot.

    Attributes:
        slot: its place in the windows.
        prompt: positions below are its prompt, which attends exactly; later ones were generated one by one, and attend to
            codes also where a soft reset computes them again. None until it is told.
        stored: tokens in its window and pages. coded: those of them in pages. Both as of the last step that was prepared.
        pruned: tokens of its prompt that a press has taken away; later tokens' positions count them.
        images: of a prompt that a press is to prune, which tokens are of images, bool (T), if the model takes any.
        staging: of a prompt whose end has not come.
        sinks: first tokens of the prefix that it shares, to be put into its window in its next step.
        row: int32 (2 + most blocks), what its row of the engine's block table will be: slot, coded tokens, blocks.
    """

    slot: int
    stored: int
    coded: int
    row: np.ndarray
    prompt: int | None = None
    images: Tensor | None = None
    staging: Staging | None = None
    sinks: Tensor | None = None
    pruned: int = 0
    in_row: int = 0  # blocks that `row` has

    @property
    def length(self) -> int:
        """Tokens that have come, prepared steps included."""
        return self.stored + self.pruned + (0 if self.staging is None else self.staging.tokens)

    def set_blocks(self, blocks: Sequence[int], is_changed: bool = False) -> None:
        """Bring `row` up to date; only new blocks are looked at, unless earlier ones have changed."""
        first = 0 if is_changed else self.in_row
        if len(blocks) > first:
            self.row[2 + first : 2 + len(blocks)] = blocks[first:]
        self.in_row = len(blocks)

    @property
    def is_in_prompt(self) -> bool:
        """Whether its next token is one of its prompt."""
        return self.prompt is not None and self.length < self.prompt

    def fork(self, slot: int) -> Request:
        row = self.row.copy()
        row[0] = slot
        staging = None if self.staging is None else self.staging.copy()
        return replace(self, slot=slot, row=row, staging=staging)


@dataclass(eq=False)
class Job:
    """A prompt that has been computed and is stored beside later steps.

    Attributes:
        stored, coded: tokens that its slot's window and pages held before.
        sides: of each layer, its exact keys and values (H, T, d), to be kept until the ticket is done.
        stored_layers: how many of them are stored. steps_beside: prepared since it began.
        ticket: of the lane that has its last layer. error: why a lane has not stored one of them.
        complete_blocks: what the engine has to make known of its blocks when it is taken in.
    """

    request_id: str
    slot: int
    stored: int
    coded: int
    sides: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stored_layers: int = 0
    steps_beside: int = 0
    ticket: Any = None
    error: Exception | None = None
    complete_blocks: Any = None


@dataclass(eq=False)
class Pruned:
    """A prompt that a press makes shorter in the step in which it ends.

    Attributes:
        pruning: who does it. request_id, request: whose prompt it is.
        kept: tokens that stay: as expected, and exactly from the first layer on.
        has_failed: nobody will read what is stored of it.
    """

    pruning: Any
    request_id: str
    request: Request
    kept: int
    has_failed: bool = False


@dataclass(eq=False)
class Chunk:
    """What one request computes in one step; the numbers are those before it, as the next step is prepared meanwhile.

    Attributes:
        at: where its tokens begin in the packed input. count: how many.
        exact: how many of them are of its prompt.
        stored, coded: tokens that its window and pages hold. staged: those that wait in `staging`.
        keeps: whether the prompt goes on in a later step, so that its keys wait in `staging`.
        blocks: of the request, the new ones included.
        sinks: to be put into its window first.
        job: that stores the prompt, which ends here; None where this step does.
        pruned: what a press makes of the prompt, if one does.
    """

    slot: int
    at: int
    count: int
    exact: int
    stored: int
    coded: int
    staged: int
    keeps: bool
    staging: Staging | None
    blocks: list[int] = field(default_factory=list)
    sinks: Tensor | None = None
    job: Job | None = None
    pruned: Pruned | None = None

    @property
    def gains(self) -> int:
        """Tokens of its prompt that are stored, if it ends here."""
        return self.staged + self.exact if self.pruned is None else self.pruned.kept

    @property
    def is_decode(self) -> bool:
        """One generated token, as kernels take it."""
        return self.exact == 0 and self.count == 1
