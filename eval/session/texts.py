"""Texts by name: files, the embedded articles, the splits of tasks. Knows no model and no measurement."""

from __future__ import annotations

import lzma
import warnings
from pathlib import Path

from hf_pqcache import demo
from hf_pqcache.demo import split_text
from hf_pqcache.eval import tasks
from hf_pqcache.eval.session.model_config import DEMO

#: What pass keys are classically hidden in (Mohtashami and Jaggi 2023, "Landmark Attention", section 4.2): nothing in it
#: looks like a key, so that small models find them, too.
NOISE = "noise"
_NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NOISE_TIMES = 8000


def read_text(path: str | Path) -> str:
    """Contents of a UTF-8 text file, plain or .xz. Raises ValueError, naming the file, for anything else."""
    path = Path(path)
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return data.decode("utf-8")
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is no .xz file, or is cut short: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}; convert it first"
        ) from error


def is_data_set(source: str) -> bool:
    """Whether `text_of` looks for it on the Hub, or in a folder of data sets."""
    return not Path(source).is_file() and source not in (DEMO, NOISE)


def held_out_text(source: str, data_dir: str | Path | None = None) -> tuple[str, str]:
    """(text, what rows call it) that calibration on `source` does not see: its test split, of a file the embedded articles."""
    name, _, split = source.partition("/")
    if not Path(source).is_file() and split != "test":
        try:
            return text_of(name, data_dir)
        except OSError:  # no network, or a folder that holds the other split alone
            pass
    return text_of(DEMO)


def text_of(source: str, data_dir: str | Path | None = None, *, is_calibration: bool = False) -> tuple[str, str]:
    """(text, what rows call it) of a file (plain or .xz), "demo", "noise", "task/split" or a text task's name.

    "demo" is the embedded articles: two thirds of them for calibration, the rest for evaluation. A task's bare name is its
    test split; for calibration its training split, or, where that is not there, its validation split: never its test
    split, which must be asked for as "task/test".

    Raises FileNotFoundError or ValueError saying what to give instead.
    """
    if Path(source).is_file():
        if source == DEMO or source in tasks.registry():
            warnings.warn(f"{source!r} is a file here and a built-in text; the file is taken", stacklevel=2)
        return read_text(source), Path(source).name
    if source == DEMO:
        calibration, held_out = split_text(demo.TEXT.read_text(encoding="utf-8"))
        return (calibration, DEMO) if is_calibration else (held_out, f"{DEMO}/test")
    if source == NOISE and not is_calibration:
        return _NOISE * _NOISE_TIMES, NOISE
    name, _, split = source.partition("/")
    try:
        task = tasks.get(name)
    except ValueError:
        raise FileNotFoundError(
            f"{source!r} is no file, not {DEMO!r}, and no task with a text like wikitext-2-raw-v1"
        ) from None
    if not hasattr(task, "text"):
        raise ValueError(f"task {name!r} has no text; give a file, {DEMO!r}, or a task like wikitext-2-raw-v1")
    if split or not is_calibration:
        return task.text(split or "test", data_dir), f"{name}/{split or 'test'}"
    for split in ("train", "validation"):
        try:
            return task.text(split, data_dir), f"{name}/{split}"
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"{data_dir} holds neither the training nor the validation split of {name} to calibrate on; give another text, or "
        f"'{name}/test' to calibrate on what is evaluated, as MILLION does: the result rows will say so"
    )
