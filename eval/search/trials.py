"""Measures shapes of a cache for a search: perplexity on a long text, pass keys, and the winner anew; knows no budget.

Perplexity alone would recommend broken caches: most texts hardly need their distant tokens. So a text is refused on which
a cache that forgets them all does nearly as well, and pass keys are asked for, too. Without a text of its own the search
takes the embedded articles, each stretch of them told twice: the second telling hangs on the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure.perplexity import perplexity
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Setup
from hf_pqcache.eval.tasks._text import run_perplexity

#: Least relative rise of perplexity, all coded tokens forgotten, on a text that can tell caches apart.
LEAST_REACH = 0.01
#: Where pass keys hide in a prompt.
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
#: Windows on which the winner is measured anew.
CHECK_WINDOWS = 2


@dataclass(frozen=True, eq=False)
class Material:
    """What shapes are measured on.

    Attributes:
        name: as rows call the text. search, check: token ids int64 (N), whole windows, of the search and of the winner's
            second measurement; the same where the text is too short for both.
        filler: text that pass keys hide in.
    """

    name: str
    search: Tensor
    check: Tensor
    filler: str


def material(tokenizer: object, text: str, name: str, *, window: int, limit: int, told_twice: bool = False) -> Material:
    """Cut a text into windows for a search.

    Args:
        limit: windows of the search. told_twice: every half window stands twice, one after the other.

    Raises ValueError for a text without a single window.
    """
    ids = token_ids(tokenizer, text)
    if told_twice:
        half = window // 2
        ids = torch.cat([ids[i : i + half].repeat(2) for i in range(0, ids.numel() - half + 1, half)] or [ids[:0]])
        window, name = 2 * half, f"{name}, told twice"
    count = ids.numel() // window
    if count < 1:
        raise ValueError(f"{name} has {ids.numel()} tokens, less than a window of {window}: give a longer --text or a --window")
    searched = min(limit, max(1, count - CHECK_WINDOWS))
    search, rest = ids[: searched * window], ids[searched * window : (searched + CHECK_WINDOWS) * window]
    checked = rest[: rest.numel() // window * window]
    return Material(name, search, checked if checked.numel() else search[: CHECK_WINDOWS * window], text)


def window_of(setup: Setup, text: str, *, told_twice: bool = False) -> int:
    """Tokens of a window where nobody says: 4096, or what the model can hold, or what makes three windows of the text."""
    available = token_ids(setup.tokenizer, text).numel() * (2 if told_twice else 1) // 3
    return max(2, min(4096, setup.limit or 4096, available // 256 * 256 or available))


class Runner:
    """Measures shapes, each once.

    Args:
        ready: the session under a cache, see `Setup.ready`.
        widest: the shape with the largest exact window of the search.
        recall_tokens: length of the prompts that hide pass keys. recall_count: keys at each of DEPTHS; 0 asks for none.

    Raises ValueError if a cache that forgets all that `widest` codes costs less than LEAST_REACH on the text.
    """

    def __init__(
        self,
        session: Session,
        ready: Callable[[CacheSpec], Session],
        text: Material,
        widest: PQConfig,
        *,
        window: int,
        recall_tokens: int,
        recall_count: int,
    ) -> None:
        self.session, self.ready, self.text, self.window = session, ready, text, window
        self.recall_tokens, self.recall_count = recall_tokens, recall_count
        self.rows: list[Row] = []
        self.exact = self._perplexity(_spec(None), text.search)
        self.reach = self._forgotten(widest) / self.exact - 1
        if self.reach < LEAST_REACH:
            raise ValueError(
                f"{text.name} cannot tell caches apart: with all but the sinks and the newest {widest.extended_residual} "
                f"tokens forgotten its perplexity changes by {self.reach:+.2%}; give a --text whose distant tokens matter"
            )
        self.exact_recall = self.recall(None)

    def codebook(self, config: PQConfig) -> Codebook | None:
        """The one of the model's own that the shape is measured with, if any."""
        return self.ready(_spec(config)).cache.codebook

    def perplexity(self, config: PQConfig) -> float:
        """Of the text of the search, as the deployed cache would have it."""
        return self._perplexity(_spec(config), self.text.search)

    def recall(self, config: PQConfig | None, seed: int = 0) -> float | None:
        """Share of the pass keys that the running cache gives back; of the exact cache without a shape. None: not asked."""
        if not self.recall_count:
            return None
        session = replace(self.ready(_spec(config)), seed=self.session.seed + seed)
        lengths, count = (self.recall_tokens,), self.recall_count
        rows = tasks.get("recall").run(session, self.text.filler, lengths=lengths, depths=DEPTHS, count=count)
        self.rows += rows
        return sum(row.value for row in rows) / len(rows)

    def again(self, config: PQConfig) -> tuple[float, float | None, float | None]:
        """(relative rise of perplexity by running the cache, recall, the exact cache's recall) on other windows and keys."""
        exact = self._perplexity(_spec(None), self.text.check)
        found = self._perplexity(_spec(config), self.text.check, "cache")
        return found / exact - 1, self.recall(config, seed=1), self.recall(None, seed=1)

    def _perplexity(self, spec: CacheSpec, ids: Tensor, mode: str | None = None) -> float:
        row = run_perplexity(self.ready(spec), self.text.name, "1", ids, window=self.window, mode=mode)
        self.rows.append(row)
        return row.value

    def _forgotten(self, config: PQConfig) -> float:
        options = {"window": self.window, "mode": "forget", "config": config, "progress": self.session.progress}
        return perplexity(self.session.model, None, self.text.search, **options).value  # type: ignore[arg-type]


def _spec(config: PQConfig | None) -> CacheSpec:
    return CacheSpec("dynamic") if config is None else CacheSpec("pq", config.to_dict())
