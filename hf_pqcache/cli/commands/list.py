"""`pqcache list`: the caches, presses, model configs and tasks that there are."""

from __future__ import annotations

from pathlib import Path

import click

from hf_pqcache.cli.commands import _options, _output

KINDS = ("caches", "presses", "configs", "tasks")


@click.command()
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS))
@_options.json_option("the names")
def command(kinds: tuple[str, ...], json_file: Path | None) -> None:
    """Name the caches, presses, model configs or tasks that commands take; all of them if none is said.

    \b
    Example:  pqcache list caches presses configs tasks
    """
    found: dict[str, dict[str, str]] = {}
    for kind in dict.fromkeys(kinds or KINDS):
        found[kind] = {"caches": _caches, "presses": _presses, "configs": _configs, "tasks": _tasks}[kind]()
        _output.show_table(kind, {"name": list(found[kind]), "what it is": list(found[kind].values())}, left=("what it is",))
    _output.write_json(json_file, found)


def _caches() -> dict[str, str]:
    from hf_pqcache.eval.session.caches import ABOUT, BITS

    return {name + (f"[:{'|'.join(map(str, BITS[name]))}]" if name in BITS else ""): about for name, about in ABOUT.items()}


def _presses() -> dict[str, str]:
    from hf_pqcache.compressors.parse import LEARNT, PRESSES

    found = {f"{name}:RATIO": (press.__doc__ or "").splitlines()[0].rstrip(".") for name, press in PRESSES.items()}
    return found | {f"{LEARNT}:FOLDER": "Merges groups of tokens as `pqcache train-compressor` has learnt it"}


def _configs() -> dict[str, str]:
    from hf_pqcache.eval.session.model_config import about, available

    return {name: about(name) for name in available()}


def _tasks() -> dict[str, str]:
    from hf_pqcache.eval.tasks import abouts

    return abouts()
