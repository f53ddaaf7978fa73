"""How a task of `pqcache eval` becomes a subcommand: options, checks, then the model, then rows; knows no task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _ray, _rows


def reads_data(when: Callable[[dict[str, Any]], bool] = lambda options: True) -> _options.Decorator:
    """Mark a task that reads a data set, for some values of its options at least; it is given `data_dir`."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.reads_data = when  # type: ignore[attr-defined]
        return function

    return mark


#: Of a task whose work can be shared: its value never comes to the task itself.
ray_option = click.option(
    "--ray",
    "ray_workers",
    type=click.IntRange(min=1),
    help="Share the work among so many workers of Ray; one that is lost costs what it had begun.",
)


def task_of(group: click.Group) -> Callable[[Callable[..., Any]], click.Command]:
    """Subcommands of `group`: options of a session, and a function (task registry, setup, **options) -> (session -> rows).

    What the function itself does comes before the model is loaded: it is there to refuse what would fail or mean nothing.
    """

    def make(function: Callable[..., Any]) -> click.Command:
        def call(json_file: Path | None, **options: Any) -> None:
            from hf_pqcache.eval import tasks

            if workers := options.pop("ray_workers", None):
                _ray.run(workers)
                return
            cache, when = _options.cache_of(options), getattr(function, "reads_data", None)
            more = {} if when is None else {"data_dir": options["data_dir"]}
            setup = _options.setup_of(options, [cache], [json_file], reads_data=when is not None and when(options))
            run = function(tasks.get, setup, **more, **options)
            session = setup.ready(setup.open(), setup.specs[0])
            with session.cache.pressing(session.model):
                rows = run(session)
            _rows.finish(rows, json_file, f"{session.model_name}, {session.cache.label}, {session.device_name}")

        call.__doc__ = function.__doc__
        call.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        return group.command(function.__name__.replace("_", "-"))(_options.session_options(call))

    return make
