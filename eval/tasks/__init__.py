"""The tasks: one file each, which holds an object named `task` (or several, `tasks`); this folder is their registry."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def registry() -> dict[str, Any]:
    """All tasks by name. Every one has `name`, `version` and a way to run that its file documents."""
    found: dict[str, Any] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for task in getattr(module, "tasks", None) or (module.task,):
            if task.name in found:
                raise ValueError(f"two tasks are called {task.name!r}")
            found[task.name] = task
    return found


def abouts() -> dict[str, str]:
    """What each task is, by the first line of its file; tasks of one family (longbench/...) under the family's name."""
    found: dict[str, str] = {}
    for name in registry():
        found.setdefault(name.partition("/")[0], "")
    for module_info in pkgutil.iter_modules(__path__):
        if not module_info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{module_info.name}")
            for task in getattr(module, "tasks", None) or (module.task,):
                found[task.name.partition("/")[0]] = (module.__doc__ or "").strip().splitlines()[0]
    return found


def get(name: str) -> Any:
    """The task called `name`. Raises ValueError naming the ones there are."""
    if name not in registry():
        raise ValueError(f"there is no task {name!r}; use one of {sorted(registry())}")
    return registry()[name]
