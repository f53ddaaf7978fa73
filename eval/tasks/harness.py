"""Any task of lm-evaluation-harness, as rows: its own prompts, examples and metrics, under the session's cache."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hf_pqcache.eval.harness_tasks import FOLDER as OWN_TASKS
from hf_pqcache.eval.measure.deployed import ANSWER_CHUNK
from hf_pqcache.eval.session.results import Row, provenance
from hf_pqcache.eval.session.session import Session


@dataclass(frozen=True)
class HarnessTask:
    """`version` is that of this file; the harness's own is one of a row's settings."""

    name: str = "harness"
    version: str = "1"

    def run(
        self,
        session: Session,
        names: Sequence[str],
        *,
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        batch_size: int = 1,
        chunk: int = ANSWER_CHUNK,
        use_chat: bool = False,
        gen_kwargs: Mapping[str, Any] | None = None,
        samples: str | Path | None = None,
    ) -> list[Row]:
        """One row for every metric of every task, of a group also of its parts; a name that has rows is not run again.

        Args:
            names: of tasks, groups or tags. include_path: a folder with more task files.
            num_fewshot: examples shown first; None leaves it to the task.
            limit: first examples only, or below 1 a share of them.
            chunk: tokens of a continuation that go in at once, see `CacheLM`. use_chat: wrap prompts in the chat template.
            gen_kwargs: over those of the task: max_gen_toks=16384 for long answers (AIME, MATH). samples: a folder for every
                prompt, answer and score, a JSON lines file a task.

        Raises:
            ImportError: the harness is not installed. ValueError: it has no such task.
        """
        settings: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "chunk": chunk, "chat": use_chat}
        settings |= {"gen_kwargs": dict(gen_kwargs)} if gen_kwargs else {}
        rows: list[Row] = []
        for name in names:
            asked = session.row(f"{self.name}/{name}", self.version, "", **settings)
            done = [] if session.force else [row for row in session.results.rows if _asked(row).key == asked.key]
            if not done:
                self.check([name], include_path)
                done = self._measure(session, asked, name, _manager(include_path), batch_size, samples)
                for row in done:
                    session.keep(row)
            rows += done
        return rows

    def check(self, names: Sequence[str], include_path: str | Path | None = None) -> None:
        """Raises ImportError if the harness is not installed, ValueError if it has no such task."""
        for name in names:
            if not _manager(include_path).match_tasks([name]):
                raise ValueError(f"lm-evaluation-harness has no task {name!r}; `pqcache lm-eval ls tasks` names all")

    def _measure(
        self, session: Session, asked: Row, name: str, manager: Any, batch_size: int, samples: str | Path | None = None
    ) -> list[Row]:
        from lm_eval import evaluator, simple_evaluate

        from hf_pqcache.eval.measure.harness import CacheLM

        settings, seed = asked.settings, session.seed
        with patch.object(evaluator, "get_git_commit_hash", lambda: None, create=True):  # git complains outside of a checkout
            found: Any = simple_evaluate(
                model=CacheLM(
                    session.model,
                    session.cache,
                    tokenizer=session.tokenizer,
                    batch_size=batch_size,
                    chunk=settings["chunk"],
                ),
                tasks=[name],
                num_fewshot=settings["num_fewshot"],
                limit=settings["limit"],
                apply_chat_template=settings["chat"],
                task_manager=manager,
                log_samples=samples is not None,
                gen_kwargs=settings.get("gen_kwargs"),
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        for part, logged in (found.get("samples") or {}).items():
            _write_samples(Path(str(samples)), part, logged)
        rows = []
        for part, values in found["results"].items():
            origin = provenance(
                session.device, harness_version=found["versions"].get(part), shots=found["n-shot"].get(part), **session.notes
            )
            own = settings if part == name else {**settings, "part": part}
            for metric, value in values.items():
                kind, _, filter_name = metric.partition(",")
                if not filter_name or kind.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = values.get(f"{kind}_stderr,{filter_name}")
                notes = {"stderr": error} if isinstance(error, float) and math.isfinite(error) else {}
                label = kind if filter_name == "none" else f"{kind} ({filter_name})"
                rows.append(replace(asked, metric=label, value=float(value), settings=own, provenance={**origin, **notes}))
        return rows


@cache
def _manager(include_path: str | Path | None) -> Any:
    """The harness's index of tasks; it reads thousands of files, so once."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("these tasks come from lm-evaluation-harness; type: pip install 'hf-pqcache[harness]'") from error
    return TaskManager(include_path=[str(OWN_TASKS), *([] if include_path is None else [str(include_path)])])


def _write_samples(folder: Path, name: str, logged: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in logged)
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _asked(row: Row) -> Row:
    """The row without what only a run tells: its metric, and which part of a group it is of."""
    settings = {name: value for name, value in row.settings.items() if name != "part"}
    return replace(row, metric="", settings=settings)


task = HarnessTask()
