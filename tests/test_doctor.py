"""`pqcache doctor`: it sees what is broken, says the line that mends it, and exits accordingly."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from packaging.requirements import Requirement

from hf_pqcache.backends import diagnose, nvrtc
from hf_pqcache.cli import main
from hf_pqcache.models import tested


def by_name(findings: list[diagnose.Finding]) -> dict[str, diagnose.Finding]:
    return {finding.name: finding for finding in findings}


def test_a_machine_without_a_gpu_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnose, "driver_version", lambda: None)
    out = tmp_path / "doctor.json"
    result = CliRunner().invoke(main, ["doctor", "--no-kernels", "--json", str(out)])
    assert result.exit_code == 0, result.output
    findings = json.loads(out.read_text())
    assert {"Python", "torch", "transformers", "driver", "CuPy", "NVRTC", "engine", "host memory"} <= {
        f["name"] for f in findings
    }
    assert not [f for f in findings if f["status"] == "fail"]


def test_an_old_package_is_named_with_the_line_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.0" if name == "transformers" else real(name))
    finding = by_name(diagnose.diagnose(kernels=False))["transformers"]
    assert (finding.status, finding.fix) == ("fail", 'pip install "transformers>=5.17"')
    result = CliRunner().invoke(main, ["doctor", "--no-kernels"])
    assert result.exit_code == 1
    assert 'pip install "transformers>=5.17"' in result.output


@pytest.mark.parametrize(("version", "status"), [("5.17.0", "ok"), ("5.24.9", "ok"), ("5.25.0.dev0", "note"), ("6.0", "note")])
def test_it_says_which_versions_were_tested(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "transformers" else real(name))
    findings = by_name(diagnose.diagnose(kernels=False))
    assert findings["transformers"].status == status
    assert all(part in findings["transformers"].detail for part in (version, "tested: 5.17 to 5.24"))
    assert "tested: 2.8 to 2.13" in findings["torch"].detail
    assert ("5.24.*" in findings["transformers"].fix) == (status == "note")


def test_what_was_tested_is_what_is_asked_for_and_pinned() -> None:
    root = Path(__file__).parents[1]
    asked = [Requirement(line) for line in tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]]
    oldest = {requirement.name: str(requirement.specifier).removeprefix(">=") for requirement in asked}
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if line.count("==") == 1)
    for package, (first, last) in tested.RANGES.items():
        assert first == oldest[package]
        assert pins[package].startswith(f"{last}.")


def test_a_transformers_that_lacks_something_says_which_ones_have_it() -> None:
    hide = "import transformers.cache_utils as c; del c.DynamicLayer"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    doctor = "from hf_pqcache.cli import main; main(['doctor', '--no-kernels'])"
    for script in ("import hf_pqcache; hf_pqcache.PagedPQCache", doctor):
        done = subprocess.run([sys.executable, "-c", f"{hide}; {script}"], capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert "lacks what hf_pqcache uses" in done.stdout + done.stderr
        assert 'pip install "transformers==5.24.*"' in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("installed", "driver", "says"),
    [
        ({}, (12, 8), "hf-pqcache[cuda12]"),
        ({}, (13, 0), "hf-pqcache[cuda13]"),
        ({"cupy-cuda13x": "14.0"}, (12, 8), "pip uninstall -y cupy-cuda13x"),
        ({"cupy-cuda12x": "13.4", "cupy-cuda13x": "14.0"}, (13, 0), "pip uninstall -y cupy-cuda12x cupy-cuda13x"),
    ],
)
def test_cupy_must_fit_the_driver(
    installed: dict[str, str], driver: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diagnose, "driver_version", lambda: driver)
    (finding,) = diagnose._cupy()
    assert finding.status == "fail"
    assert says in finding.fix


def test_a_kernel_that_does_not_compile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find", lambda: (None, "stand-in"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    broken = "append.cu"
    monkeypatch.setattr(nvrtc, "compile_error", lambda spec, cc: "line 1: no\nmore" if spec.source == broken else None)
    findings = list(diagnose._kernels())
    assert len(findings) == len(diagnose.dispatch.SHAPES)
    *coded, paged = findings
    assert all(f.status == "fail" and "append.cu for sm_80: line 1: no" in f.detail for f in coded)
    assert (paged.name, paged.status) == ("kernels d=128", "ok")
    broken = "append_paged.cu"
    assert [f.status for f in diagnose._kernels()] == ["ok"] * len(coded) + ["fail"]
    broken = "none"
    assert all(f.status == "ok" for f in diagnose._kernels())
