"""Who may import whom: a file of the package imports only from its own floor's list or below."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: {
        *{"arguments", "config", "errors", "identity", "positions", "shapes", "hf_names", "layout", "pq", "kmeans", "hub"},
        *{"handles", "slabs", "tested"},
    },
    1: {"codebook", "pages", "plan", "pool", "state", "jit", "offload", "functions", "padding", "model_code", "samples"},
    2: {"torch_engine", "kernel_plan", "selection", "cuda_engine", "nvrtc", "parallel"},
    3: {"engine", "attention", "calibrate", "reference", "diagnose"},
    4: {"footprint", "ops", "room", "storage"},
    5: {"steps"},
    6: {"layer", "hybrid", "sequences"},
    7: {"paged", "cache"},
    8: {"eval"},
    9: {"commands"},
    10: {"cli"},
}
#: Files of one floor that may know a sibling.
SIBLINGS = {
    ("hybrid", "layer"),
    ("cuda_engine", "kernel_plan"),
    ("selection", "kernel_plan"),
    ("pool", "pages"),
    ("samples", "plan"),
    ("state", "pool"),
    ("jit", "pool"),
    ("storage", "room"),
    ("cache", "paged"),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their first name after hf_pqcache."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_pqcache":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hf_pqcache.")}
    return {name for name in found if name in FLOOR}


def test_every_file_has_a_floor() -> None:
    files = {path.stem for path in (ROOT / "hf_pqcache").glob("*.py")} - {"__init__", "__main__"}
    assert files <= set(FLOOR), f"give {sorted(files - set(FLOOR))} a floor in this test"


def test_imports_point_down() -> None:
    for path in [*(ROOT / "hf_pqcache").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        folder = path.relative_to(ROOT / "hf_pqcache" if path.is_relative_to(ROOT / "hf_pqcache") else ROOT).parts[0]
        name = Path(folder).stem
        if name in ("__init__", "__main__", "demo"):
            continue
        for other in imports_of(path):
            allowed = FLOOR[other] < FLOOR[name] or (name, other) in SIBLINGS or name == other
            assert allowed, f"{path.name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"


def test_only_one_file_imports_cupy() -> None:
    users = [p.name for p in (ROOT / "hf_pqcache").glob("*.py") if "import cupy" in p.read_text()]
    assert users == ["jit.py"]
