"""Who may import whom: each folder of the package is one subject, and imports only those listed before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_pqcache"
#: From the ground up.
ORDER = ["arguments", "config", "errors", "demo", "models", "codebook", "pages", "backends", "storage", "attention"]
ORDER += ["compressors", "cache", "batching", "serve", "eval", "cli"]
#: The same within eval/.
EVAL_ORDER = ["quantizers", "session", "report", "measure", "metrics", "harness_tasks", "tasks", "bench", "selftest", "search"]
EVAL_ORDER += ["calibrate", "learnt_press", "compare", "pipeline", "publish", "demo", "scale"]
#: What a name stands for is only known when it is used: a text may be one of a task.
LATE = {(("eval", "session", "texts"), ("eval", "tasks"))}
MOST_LINES, MOST_FUNCTION_LINES = 350, 60
#: Yet to be split; an entry goes with the next change there.
TOO_LONG = {
    "tune.py command",
    "setup.py prepare",
}


def sources() -> list[Path]:
    """Every Python file of the package, eval/ by its own place."""
    own = [path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "eval")]
    return [*own, *(ROOT / "eval").rglob("*.py")]


def name_of(path: Path) -> tuple[str, ...]:
    """("pages", "codec") or ("eval", "report", "html"): a file's name below hf_pqcache."""
    root = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return tuple(part for part in path.relative_to(root).with_suffix("").parts if part not in ("__init__", "__main__"))


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Names below hf_pqcache that a file imports, at the top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_pqcache":
            inner = tuple(node.module.split(".")[1:])
            found |= {(*inner, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("hf_pqcache.")}
    return found


@pytest.mark.parametrize(("order", "depth"), [(ORDER, 0), (EVAL_ORDER, 1)], ids=["hf_pqcache", "eval"])
def test_imports_point_down(order: list[str], depth: int) -> None:
    for path in sources():
        own = name_of(path)
        if len(own) <= depth or (depth and own[0] != "eval"):
            continue
        assert own[depth] in order, f"give {own[depth]} a place in this test"
        for other in imports_of(path):
            if (own, other) in LATE or other[:depth] != own[:depth] or not {*other[depth : depth + 1]} & {*order}:
                continue
            assert order.index(other[depth]) <= order.index(own[depth]), f"{'.'.join(own)} imports {'.'.join(other)}"


def test_only_one_file_imports_cupy() -> None:
    assert [name_of(path) for path in sources() if "import cupy" in path.read_text()] == [("backends", "jit")]


def lines_of(function: ast.FunctionDef) -> int:
    """Without what the function says of itself."""
    told = ast.get_docstring(function, clean=False) or ""
    return (function.end_lineno or 0) - function.lineno + 1 - len(told.splitlines())


def test_no_file_is_longer_than_a_sitting_and_no_function_than_a_screen() -> None:
    files = [*sources(), *(path for path in (ROOT / "kernels").iterdir() if path.suffix != ".md")]
    found = {path.name for path in files if len(path.read_text().splitlines()) > MOST_LINES}
    for path in sources():
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        found |= {f"{path.name} {node.name}" for node in functions if lines_of(node) > MOST_FUNCTION_LINES}
    assert found == TOO_LONG
