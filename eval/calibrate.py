"""A codebook of the model's own, and whether it beats the one that every model gets, on text that it never saw."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.given import RECOMMENDED
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Setup, fitted
from hf_pqcache.eval.tasks._text import run_perplexity


@dataclass(frozen=True)
class Comparison:
    """Perplexities of a text under the exact cache, the package's codebook and the model's own, which codes alike.

    Attributes:
        rows: the three, in this order.
    """

    text: str
    rows: list[Row]

    @property
    def shipped_loss(self) -> float:
        """Relative rise of perplexity over the exact cache's; 0.01 is 1 %."""
        return self.rows[1].value / self.rows[0].value - 1

    @property
    def own_loss(self) -> float:
        return self.rows[2].value / self.rows[0].value - 1

    @property
    def wins(self) -> bool:
        """Whether the model's own loses less."""
        return self.own_loss < self.shipped_loss

    def lines(self) -> list[str]:
        """What to tell, each line within 80 columns."""
        return [
            f"held out: {self.text}, windows of {self.rows[0].settings['window']} tokens",
            f"loss: {self.shipped_loss:+.2%} with the codebook that every model gets, {self.own_loss:+.2%} with its own",
            "its own wins" if self.wins else "its own does not win: leave it, there is nothing to publish",
        ]


def own_codebook(setup: Setup, session: Session, text: str, name: str, *, limit: int = 4) -> tuple[Codebook, Comparison]:
    """Learn a codebook as `setup` says, and compare it.

    Args:
        text, name: held-out text, and what rows call it. limit: windows of it.
    """
    spec = setup.specs[0]
    book = setup.learning.codebook(session, spec.config)
    ids = token_ids(session.tokenizer, text)
    window = min(setup.window, ids.numel())
    rows = [
        run_perplexity(session.with_cache(one), name, "1", ids, window=window, limit=limit)
        for one in (CacheSpec("dynamic"), spec, fitted(session, spec, book))
    ]
    found = Comparison(name, rows)
    noted = {"held_out": name, "held_out_loss_shipped": round(found.shipped_loss, 6), "held_out_loss": round(found.own_loss, 6)}
    settings = {setting: getattr(spec.config, setting) for setting in RECOMMENDED}
    return replace(book, metadata={**book.metadata, **noted}, settings=settings), found
