"""hf_pqcache/README.md: every file, and every name said to be in one, is there; so are the routes a stranger asks for."""

from __future__ import annotations

import importlib
import re
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_pqcache"
TEXT = (PACKAGE / "README.md").read_text()
ROUTES = ("pages freed", "kernel chosen", "recent window written", "another cache method")


def named(text: str) -> set[tuple[str, str]]:
    """(file, name) of every "`file.py`: `name`"."""
    return set(re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)`", text))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+(?:\.(?:py|cuh?)|/))`", TEXT))))
def test_every_file_is_there(path: str) -> None:
    places = [ROOT, PACKAGE, *(folder for folder in PACKAGE.iterdir() if folder.is_dir())]
    assert any((place / path).exists() for place in places)


@pytest.mark.parametrize(("path", "name"), sorted(named(TEXT)))
def test_every_name_is_where_it_is_said_to_be(path: str, name: str) -> None:
    module = importlib.import_module("hf_pqcache." + path.removesuffix(".py").replace("/", "."))
    assert attrgetter(name)(module).__module__ == module.__name__


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_names_a_place(route: str) -> None:
    (answer,) = (line for line in TEXT.split("\n- **") if route in line.split("?**")[0])
    assert named(answer)
