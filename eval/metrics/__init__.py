"""Metrics as `evaluate` modules, loaded by path and without a network: evaluate.load(str(FOLDER / "longbench.py"), "rouge")."""

from pathlib import Path

FOLDER = Path(__file__).parent
