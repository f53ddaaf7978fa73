"""Tasks for lm-evaluation-harness that need no network: one YAML file each, beside the file that makes its examples."""

from pathlib import Path

FOLDER = Path(__file__).parent
