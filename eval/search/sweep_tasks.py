"""Names of tasks -> what a sweep runs for each: a perplexity, recall, a benchmark; all checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.measure.recall import ANSWER_TOKENS, check_recall
from hf_pqcache.eval.search.sweep import Run, perplexity_run, recall_run
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Setup
from hf_pqcache.eval.session.texts import is_data_set, text_of


def is_text(name: str) -> bool:
    """Whether a task's name means the perplexity of a text."""
    is_task = name in tasks.registry() and hasattr(tasks.get(name), "check")
    return not (is_task or name == "recall" or name.partition("/")[0] == "harness")


def reads_data_set(name: str) -> bool:
    """Whether a task reads a data set that may lie in a folder."""
    if is_text(name):
        return is_data_set(name)
    return name in tasks.registry() and getattr(tasks.get(name), "reads_data", True) and name != "recall"


def prepare_runs(
    setup: Setup,
    names: Sequence[str],
    *,
    tokens: int | None,
    window: int | None,
    limit: int,
    recall_count: int,
    data_dir: Path | None,
) -> tuple[dict[str, Run], int]:
    """(run by name, length) of `names`: recall, longbench/x, ruler/x, harness/x, or a text as `text_of` takes it.

    Args:
        tokens: of recall and of the bytes; None is 2048, or what the model holds. window: of a perplexity; None is `tokens`.
        limit: windows, and examples of a benchmark. recall_count: pass keys.

    Raises ValueError, FileNotFoundError or ImportError for a name that is none of these, or what the model cannot hold.
    """
    (length,) = lengths_within(setup.limit, None if tokens is None else (tokens,), ANSWER_TOKENS, "a sweep", offered=(2048,))
    runs: dict[str, Run] = {}
    for name in names:
        family = name.partition("/")[0]
        if name == "recall":
            filler = text_of("demo")[0]
            check_recall(setup.tokenizer, token_ids(setup.tokenizer, filler), (length,), (0.5,), setup.limit)
            runs[name] = recall_run(filler, length, recall_count)
        elif family == "harness":
            task, asked = tasks.get("harness"), name.partition("/")[2]
            task.check([asked])
            runs[name] = partial(_run_harness, task, asked, limit)
        elif name in tasks.registry() and hasattr(tasks.get(name), "check"):
            task = tasks.get(name)
            most = task.check(setup.limit, setup.tokenizer, max_tokens=None, data_dir=data_dir, limit=limit)
            options: dict[str, Any] = {"max_tokens": most, "data_dir": data_dir, "limit": limit}
            runs[name] = partial(task.run, **options)
        else:
            text, told = text_of(name, data_dir)
            size, wide = token_ids(setup.tokenizer, text).numel(), window or length
            if size < wide:
                raise ValueError(f"{name} has {size} tokens and a window of {wide} is asked for: lower --window or --tokens")
            runs[name] = perplexity_run(text, told, window=wide, limit=limit)
    return runs, length


def _run_harness(task: Any, name: str, limit: int, session: Session) -> list[Row]:
    found: list[Row] = task.run(session, [name], limit=limit)
    return found
