"""A checkout, an editable install, a wheel and a source archive hold the same modules, and nothing else of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
ROOT = Path(__file__).parents[1]
FOLDERS = ("eval", "kernels", "model_configs")
#: Told by a process that starts outside the checkout and knows no other installed package: what is found, and where.
ASK = """
import importlib.util, json, site, sys
site.addsitedir(sys.argv[1])
def where(name):
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return spec and (spec.origin or list(spec.submodule_search_locations)[0])
print(json.dumps({name: where(name) for name in sys.argv[2:]}))
"""
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


def run(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-P", *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def files_of_the_package(root: Path) -> set[str]:
    """Every file that belongs into a wheel, by its name there."""
    found = {path for folder in FOLDERS for path in (root / "hf_pqcache" / folder).glob("**/*")}
    found |= set((root / "hf_pqcache").glob("**/*"))
    unwanted = ("__pycache__", "pictures")
    return {str(path.relative_to(root)) for path in found if path.is_file() and not set(path.parts) & set(unwanted)}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as far as building goes, which writes into it."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    copy.mkdir()
    for name in ("hf_pqcache", *FOLDERS, "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(kind: str, source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    run("-c", BUILD, kind, str(folder), cwd=source)
    return next(folder.iterdir())


def wheel_files(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def ask(site: Path, *names: str, cwd: Path) -> dict[str, str | None]:
    return dict(json.loads(run("-S", "-c", ASK, str(site), *names, cwd=cwd)))


def test_a_wheel_holds_the_package_also_when_it_is_built_from_a_source_archive(checkout: Path, tmp_path: Path) -> None:
    expected = files_of_the_package(checkout)
    assert {
        "hf_pqcache/eval/report/report.html.j2",
        "hf_pqcache/kernels/page.cuh",
        "hf_pqcache/model_configs/tiny.yaml",
    } <= expected
    assert wheel_files(build("build_wheel", checkout, tmp_path / "wheel")) == expected
    archive = build("build_sdist", checkout, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        assert not [member.name for member in tar if member.issym() or member.islnk()]
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert wheel_files(build("build_wheel", unpacked, tmp_path / "again")) == expected


@pytest.mark.parametrize("kind", ["checkout", "editable"])
def test_nothing_else_of_the_checkout_can_be_imported(kind: str, checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    if kind == "editable":
        with zipfile.ZipFile(build("build_editable", checkout, tmp_path / "wheel")) as wheel:
            wheel.extractall(site)
    else:
        (site / "here.pth").write_text(str(checkout))
    names = [path.stem for path in checkout.iterdir()]
    inside = [f"hf_pqcache.{name}" for name in names]
    found = ask(site, "hf_pqcache", *inside, *names, cwd=tmp_path)
    assert found["hf_pqcache"] == str(checkout / "hf_pqcache" / "__init__.py")
    assert {name for name in inside if found[name]} == {f"hf_pqcache.{folder}" for folder in FOLDERS}
    assert str(found["hf_pqcache.eval"]).startswith(str(checkout / "hf_pqcache" / "eval"))
    if kind == "editable":  # a folder on the path shows whatever is in it, as the checkout's does
        assert {name for name in names if found[name]} == {"hf_pqcache"}


def test_gpu_tests_are_collected_without_what_only_other_tests_need() -> None:
    missing = ("datasets", "evaluate", "lm_eval", "jieba", "playwright", "hypothesis", "matplotlib", "jinja2", "accelerate")
    block = f"import sys; sys.modules.update(dict.fromkeys({missing}))"
    script = f"{block}; import pytest; sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis brings a plugin
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


def test_linters_see_each_file_once() -> None:
    """The links inside the package lead to files that they see anyway."""
    pytest.importorskip("ruff")
    seen = [Path(line).resolve() for line in run("-m", "ruff", "check", "--show-files", ".", cwd=ROOT).splitlines()]
    assert ROOT / "eval" / "demo.py" in seen
    assert len(seen) == len(set(seen))


def test_every_package_is_named_for_the_build() -> None:
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    roots = [ROOT / "hf_pqcache", *(ROOT / folder for folder in FOLDERS)]
    inits = [path.parent for root in roots for path in root.rglob("__init__.py")]
    there = {str(path.relative_to(ROOT)).replace("/", ".") for path in inits}
    there = {name if name.startswith("hf_pqcache") else f"hf_pqcache.{name}" for name in there}
    assert named == there | {"hf_pqcache.kernels", "hf_pqcache.model_configs"}
