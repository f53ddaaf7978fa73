"""What a check is, and how checks are run: one after the other, timed, none stopping the rest; knows no cache."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Status = Literal["ok", "skipped", "FAILED"]
#: What to do about a failure that its user cannot mend.
REPORT = "run `pqcache doctor`; if it finds nothing, report what `pqcache selftest --debug --json selftest.json` writes"


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and how much of them.

    Attributes:
        device: the GPU if there is one.
        is_full: more shapes, longer runs.
    """

    device: torch.device
    is_full: bool = False

    @classmethod
    def here(cls, is_full: bool = False) -> Machine:
        return cls(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), is_full)


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
        phase: 1 data structures, 2 kernels, 3 integration.
        run: raises CheckFailed or CheckSkipped; returns what has been checked, in a few words.
    """

    name: str
    phase: int
    run: Callable[[Machine], str]


class CheckFailed(Exception):
    """Something differs from what it must be."""

    def __init__(self, expected: str, got: str, fix: str = REPORT) -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got, self.fix = expected, got, fix


class CheckSkipped(Exception):
    """This machine cannot run the check; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check. `expected`, `got`, `fix` and `traceback` are empty unless it failed."""

    name: str
    phase: int
    status: Status
    seconds: float
    detail: str = ""
    expected: str = ""
    got: str = ""
    fix: str = ""
    traceback: str = ""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors lose more to waking threads than they gain: up to eight times the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_checks(checks: Sequence[Check], machine: Machine, announce: Callable[[str], object] | None = None) -> Iterator[Outcome]:
    """Run every check, whatever becomes of those before it. `announce` is told the name of each before it runs."""
    for check in checks:
        if announce is not None:
            announce(check.name)
        begin = time.perf_counter()
        fields: dict[str, Any] = {"status": "ok"}
        try:
            with _one_thread():
                fields["detail"] = check.run(machine)
        except CheckSkipped as reason:
            fields = {"status": "skipped", "detail": str(reason)}
        except CheckFailed as failed:
            fields = {"status": "FAILED", "expected": failed.expected, "got": failed.got, "fix": failed.fix}
            fields["traceback"] = traceback.format_exc()
        except Exception as error:
            fields = {"status": "FAILED", "expected": "no error", "got": f"{type(error).__name__}: {error}", "fix": REPORT}
            fields["traceback"] = traceback.format_exc()
        yield Outcome(check.name, check.phase, seconds=round(time.perf_counter() - begin, 3), **fields)


def expect(condition: bool, expected: str, got: object, fix: str = REPORT) -> None:
    """Raises CheckFailed unless `condition` holds."""
    if not condition:
        raise CheckFailed(expected, str(got), fix)


def expect_equal(what: str, got: Any, want: Any, fix: str = REPORT) -> None:
    """Raises CheckFailed unless got == want, for tensors in shape and in every number."""
    if isinstance(want, Tensor):
        same = got.shape == want.shape and torch.equal(got.cpu(), want.cpu())
        differing = int((got.cpu() != want.cpu()).sum()) if got.shape == want.shape else "another shape"
        expect(same, f"{what} equal to the plain computation", f"{differing} of {want.numel()} numbers differ", fix)
    else:
        expect(got == want, f"{what} = {want}", got, fix)


def expect_close(what: str, got: Tensor, want: Tensor, bound: float, fix: str = REPORT) -> float:
    """The relative L2 distance of `got` from `want`. Raises CheckFailed if it is above `bound`, or not finite."""
    expect(got.shape == want.shape, f"{what} of shape {tuple(want.shape)}", tuple(got.shape), fix)
    got, want = got.double().cpu(), want.double().cpu()
    distance = float((got - want).norm() / want.norm().clamp_min(1e-30))
    expect(distance <= bound, f"{what} within {bound:g} of the plain computation (relative L2)", f"{distance:.3g}", fix)
    return distance
