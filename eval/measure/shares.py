"""Work that several processes share, journalled, so that a lost one costs what it had begun; knows no task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from tqdm.auto import tqdm

from hf_pqcache.eval.measure.journal import Journal
from hf_pqcache.eval.session import distributed
from hf_pqcache.eval.session.session import Session

#: (how much work there is, what makes one piece by its number) -> a figure of each, in order.
Each = Callable[[int, Callable[[int], float]], list[float]]


def one_by_one(count: int, work: Callable[[int], float]) -> list[float]:
    """All of it, here."""
    return [work(i) for i in range(count)]


def summed(figures: Iterable[float]) -> float:
    """One after the other, which `sum` does not do in every Python."""
    total = 0.0
    for figure in figures:
        total += figure
    return total


def texts(session: Session, key: str, count: int, work: Callable[[int], str], *, name: str, unit: str) -> dict[int, str]:
    """What `work` makes of each number below `count`: this process's share is made here, and kept beside the results if any.

    Args:
        key: of the row, by which a later run finds what there is. name, unit: for the progress bar.
    """
    rank, processes = distributed.world()
    path = session.results.path
    folder = None if path is None else path.with_suffix(".predictions") / key[:16]
    journal = Journal(folder, rank, processes, fresh=session.force)
    todo = [i for i in range(rank, count, processes) if i not in journal.predictions]
    for i in tqdm(todo, desc=name, unit=unit, disable=not session.progress or rank > 0, leave=False):
        journal.add(i, work(i))
    return distributed.gather(journal.predictions)


def figures(session: Session, keys: Sequence[str], *, name: str, unit: str) -> Each:
    """A way through work of which each piece is a figure: as `texts` where there are several processes, and bit for bit.

    keys: all that decides what the pieces are.
    """
    if distributed.world()[1] == 1:
        return one_by_one
    key = hashlib.sha256(" ".join(keys).encode()).hexdigest()

    def shared(count: int, work: Callable[[int], float]) -> list[float]:
        found = texts(session, key, count, lambda i: float(work(i)).hex(), name=name, unit=unit)
        return [float.fromhex(found[i]) for i in range(count)]

    return shared
