"""What the words of a command line are parsed to; knows no command."""

from __future__ import annotations

import json
import re
from typing import Any

import click

_DEVICE = re.compile(r"(auto|cpu|(cuda|mps|xpu|hpu|npu|mlu)(:\d+)?)")


class Lengths(click.ParamType):
    """1K,2K,512 as a list of positive ints."""

    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        words = str(value).replace(" ", "").split(",")
        try:
            found = [int(word[:-1]) * 1024 if word[-1:] in ("k", "K") else int(word) for word in words]
        except ValueError:
            self.fail(f"{value!r}: give lengths like 512,1K,32K", param, ctx)
        if not found or min(found) < 1:
            self.fail(f"{value!r}: give one length or more, each of at least 1 token, like 512,1K,32K", param, ctx)
        return list(dict.fromkeys(found))


class Length(click.ParamType):
    """128K or 131072 as an int."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = [value] if isinstance(value, int) else Lengths().convert(value, param, ctx)
        if len(found) != 1:
            self.fail(f"{value!r}: give one length like 2048 or 128K", param, ctx)
        return found[0]


class Limit(click.ParamType):
    """100 examples, or 0.1: a tenth of them."""

    name = "limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = float(value)
        except ValueError:
            found = -1.0
        if not (0 < found < 1 or (found >= 1 and found.is_integer())):
            self.fail(f"{value!r}: give a number of examples, or a share of them between 0 and 1", param, ctx)
        return found if found < 1 else int(found)


class Numbers(click.ParamType):
    """0,0.25,1 as a list of numbers of one kind.

    Args:
        kind: int or float. low, high: bounds, included.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], low: float, high: float) -> None:
        self.kind, self.low, self.high = kind, low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        try:
            found = list(dict.fromkeys(self.kind(word) for word in str(value).split(",")))
        except ValueError:
            found = []
        if not found or not all(self.low <= x <= self.high for x in found):
            kind = "whole numbers" if self.kind is int else "numbers"
            self.fail(f"{value!r}: give {kind} from {self.low:g} to {self.high:g}, separated by commas", param, ctx)
        return found


class Words(click.ParamType):
    """one,two as a list of words."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        found = value if isinstance(value, list) else [word.strip() for word in str(value).split(",")]
        if not all(found):
            self.fail(f"{value!r}: give names separated by commas, none of them empty", param, ctx)
        return list(dict.fromkeys(found))


class Device(click.ParamType):
    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _DEVICE.fullmatch(str(value)):
            self.fail(f"{value!r} is no device; use cpu, cuda, cuda:1, mps or auto", param, ctx)
        return str(value)


class Settings(click.ParamType):
    """name=value,... or a JSON object, as a dict; values are read as JSON where they are."""

    name = "settings"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        if value.lstrip().startswith("{"):
            try:
                return dict(json.loads(value))
            except ValueError as error:
                self.fail(f"{value!r} is no JSON object: {error}", param, ctx)
        pairs = [word.partition("=") for word in value.split(",") if word.strip()]
        if not all(name.strip() and sign for name, sign, _ in pairs):
            self.fail(f"{value!r}: give name=value,name=value or a JSON object", param, ctx)
        return {name.strip(): _value(text.strip()) for name, _, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
