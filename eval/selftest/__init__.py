"""`pqcache selftest`: whether what is installed works on this machine; needs no tests folder, no data and no network."""

from __future__ import annotations

from hf_pqcache.eval.selftest import integration, kernels, structures
from hf_pqcache.eval.selftest.checks import Check

#: Data structures, kernels, integration.
CHECKS: tuple[Check, ...] = (*structures.CHECKS, *kernels.CHECKS, *integration.CHECKS)
PHASES = {1: "data structures", 2: "kernels", 3: "integration"}
