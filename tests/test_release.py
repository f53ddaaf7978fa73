"""A release: one version everywhere, and wheels and source archives that install and run where nothing else is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import interpreters
import pytest
import yaml

import hf_pqcache

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
TORCH = re.findall(r"torch==[\d.]+", (ROOT / "README.md").read_text())[0]
#: Told by an installed package: its version, its modules that cannot be imported, and whether type checkers find its types.
ASK = """
import importlib, json, pkgutil, hf_pqcache
from importlib.metadata import version
from importlib.resources import files
failed = {}
for module in pkgutil.walk_packages(hf_pqcache.__path__, "hf_pqcache."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = error.name
typed = files("hf_pqcache").joinpath("py.typed").is_file()
print(json.dumps([version("hf-pqcache"), hf_pqcache.__version__, failed, typed]))
"""
#: What modules may lack: each is an extra.
EXTRAS = {
    "cupy",
    "lm_eval",
    "jieba",
    "jinja2",
    "matplotlib",
    "hqq",
    "optimum",
    "gguf",
    "ray",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "httpx",
}
needs_network = pytest.mark.skipif(os.environ.get("PIP_NO_INDEX") == "1", reason="pip may not ask an index")


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert hf_pqcache.__version__ == citation["version"] == newest[1]
    assert str(citation["date-released"]) == newest[2]
    assert citation["license"] == project()["license"]


def test_every_python_that_is_promised_is_tried() -> None:
    promised = re.findall(r"Python :: (3\.\d+)", str(project()["classifiers"]))
    assert tuple(promised) == PYTHONS
    assert project()["requires-python"] == f">={PYTHONS[0]}"


def test_a_recipe_names_what_there_is() -> None:
    """Every file and folder in CONTRIBUTING.md that does not stand for a new one."""
    for path in re.findall(r"`([\w./]+/[\w.]*)[:`]", (ROOT / "CONTRIBUTING.md").read_text()):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wheel and a source archive of the files that git knows, or all there are where there is no git."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    try:
        files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    except (AssertionError, OSError):
        pytest.skip("not a git checkout")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    code = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    for kind in ("build_wheel", "build_sdist"):
        (folder / kind).mkdir()
        run(sys.executable, "-P", "-c", code, kind, folder / kind, cwd=source)
    return [next((folder / kind).iterdir()) for kind in ("build_wheel", "build_sdist")]


@needs_network
@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_it_installs_and_runs_where_nothing_else_is(version: str, archives: list[Path], tmp_path: Path) -> None:
    """Minutes, and gigabytes where torch comes with CUDA: an index of CPU builds in PIP_EXTRA_INDEX_URL spares them."""
    found = interpreters.find(version)
    if found is None:
        pytest.skip(f"no Python {version} here: neither python{version} on the PATH, nor one of pyenv or uv")
    wheel, archive = archives
    run(found, "-m", "venv", "env", cwd=tmp_path)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", TORCH, wheel, cwd=tmp_path)
    for installed in (wheel, archive):
        if installed == archive:
            run(*pip, "install", "--quiet", "--force-reinstall", "--no-deps", archive, cwd=tmp_path)
        assert "No broken requirements" in run(*pip, "check", cwd=tmp_path)
        told, own, failed, is_typed = json.loads(run(python, "-W", "ignore", "-c", ASK, cwd=tmp_path).splitlines()[-1])
        assert told == own == hf_pqcache.__version__
        assert set(failed.values()) <= EXTRAS, failed
        assert is_typed
    small = ("--tokens", "256", "--limit", "1", "--recall-count", "1", "--json", "demo.json", "--quiet")
    run(python, "-m", "hf_pqcache", "demo", *small, cwd=tmp_path)
    assert (tmp_path / "demo.json").stat().st_size > 100
