"""Runs this command line in several processes of a Ray cluster, as `accelerate launch` does on one machine; knows no task.

What a command has finished is in its results and journals, so a lost worker costs what it had begun: all start again, and
go on where they were. Workers of other machines need the package, the model and the data, and a common folder of results.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import click

from hf_pqcache.cli.commands import _output

TRIES = 3
#: Seconds in which a worker that others have lost is found dead.
PATIENCE_S = 10.0


class Worker:
    """One process, which runs the command when it knows the others."""

    def address(self) -> tuple[str, int]:
        """Where the first one can be reached: (address, a free port)."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, arguments: Sequence[str], folder: str, settings: dict[str, str]) -> tuple[int, str, str]:
        """(exit code, what it wrote, what it said of errors)."""
        from hf_pqcache.cli.app import main

        os.environ.update(settings)
        os.chdir(folder)
        out, errors, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(errors):
            try:
                main(list(arguments))
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        return code, out.getvalue(), errors.getvalue()


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """A command line without an option that takes one value."""
    found, skip = [], False
    for word in arguments:
        if not skip and word != name and not word.startswith(f"{name}="):
            found.append(word)
        skip = word == name and not skip
    return found


def run(workers: int) -> None:
    """Run this process's command line without --ray. Raises ClickException where a worker fails, or too many are lost."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise click.ClickException("ray is not installed; type: pip install 'hf-pqcache[ray]'") from error
    import torch

    gpus = 1 if torch.cuda.is_available() else 0
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(num_cpus=max(workers, os.cpu_count() or 1), include_dashboard=False, **quiet)
    try:
        for _ in range(TRIES):
            found = _try(ray, workers, gpus)
            if found is not None:
                _output.say(found.rstrip("\n"))
                return
            _output.note("a worker was lost; all start again and go on where they were")
        raise click.ClickException(f"workers were lost {TRIES} times; what is finished is kept, type the line again to go on")
    finally:
        ray.shutdown()


def _try(ray: Any, workers: int, gpus: int) -> str | None:
    """What the first worker wrote; None where one was lost."""
    made = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=2)(Worker)
    actors = [made.remote() for _ in range(workers)]
    try:
        host, port = ray.get(actors[0].address.remote())
        world = {"WORLD_SIZE": str(workers), "MASTER_ADDR": host, "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        if not gpus:
            world["ACCELERATE_USE_CPU"] = "true"
        arguments = without_option(sys.argv[1:], "--ray")
        runs = [actor.run.remote(arguments, os.getcwd(), {**world, "RANK": str(i)}) for i, actor in enumerate(actors)]
        waiting = list(runs)
        while waiting:
            done, waiting = ray.wait(waiting)
            code, _, errors = ray.get(done[0])
            if code:
                if _is_one_lost(ray, actors):
                    return None
                raise click.ClickException(_last_line(errors) or f"a worker ended with {code}")
        return str(ray.get(runs[0])[1])
    except ray.exceptions.RayActorError:
        return None
    finally:
        for actor in actors:
            ray.kill(actor)


def _is_one_lost(ray: Any, actors: Sequence[Any]) -> bool:
    """Whether a worker is gone; the others may have failed for that alone, and sooner."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            ray.get([actor.address.remote() for actor in actors], timeout=PATIENCE_S)
        except ray.exceptions.RayActorError:
            return True
        except ray.exceptions.GetTimeoutError:
            return False
        time.sleep(0.5)
    return False


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else ""
