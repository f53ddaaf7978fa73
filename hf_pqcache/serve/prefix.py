"""Which replica a request should go to, so that equal beginnings meet the tokens that are stored already; knows no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

#: Characters, or token ids, of a prompt by which it is known. Requests that share them share a replica.
BEGINNING = 512
#: A replica that has so many more requests than another is left out while it has.
SLACK = 8


def key_of(body: bytes) -> str | None:
    """By what a completion or chat is known: how its text begins. None for everything else, and for what is no request."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return key_of_request(document) if isinstance(document, dict) else None


def key_of_request(document: Mapping[str, Any]) -> str | None:
    """The same of a body that has been read."""
    said: Any = document.get("prompt") or document.get("messages")
    if isinstance(said, list) and said and isinstance(said[0], dict):
        text = "\n".join(f"{one.get('role')}: {one.get('content')}" for one in said if isinstance(one, dict))
    elif isinstance(said, list) and said and isinstance(said[0], int):
        text = ",".join(map(str, said[:BEGINNING]))
    elif isinstance(said, list) and said:
        text = str(said[0])
    else:
        text = said if isinstance(said, str) else ""
    return hashlib.sha256(text[:BEGINNING].encode(errors="replace")).hexdigest() if text else None


def ranked(key: str | None, load: Mapping[str, int], places: int | None = None) -> list[str]:
    """Replicas by preference.

    By rendezvous hashing (Thaler, Ravishankar 1996): every router comes to the same order, and a replica that comes or goes
    moves its own requests only. The preferred one is left out while a request would wait there for a place and find one
    elsewhere, and while it has SLACK more requests than another. Without a key, the idle come first.

    Args:
        load: requests that each has. places: those of them that run at a time; None if nobody has said.
    """
    least = min(load.values(), default=0)
    if key is None:
        return sorted(load, key=lambda name: (load[name], name))
    first = sorted(load, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())
    most = SLACK + least if places is None or least >= places else min(places, SLACK + least)
    return sorted(first, key=lambda name: load[name] >= most)  # stable


def with_label(texts: Mapping[str, str], label: str = "replica") -> str:
    """Prometheus texts of several processes as one: each sample says whose it is, what a figure means stands once."""
    told: dict[str, list[str]] = {}
    family = ""
    for name, text in texts.items():
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                lines = told.setdefault(family, [])
                if line not in lines:
                    lines.append(line)
                continue
            figure, _, value = line.rpartition(" ")
            own, brace, labels = figure.partition("{")
            told.setdefault(family, []).append(f'{own}{{{label}="{name}"{"," + labels if brace else "}"} {value}')
    return "\n".join(_heads_first(told)) + "\n"


def _heads_first(told: Mapping[str, Sequence[str]]) -> list[str]:
    return [line for lines in told.values() for line in sorted(lines, key=lambda line: not line.startswith("#"))]
