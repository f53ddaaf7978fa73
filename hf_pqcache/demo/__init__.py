"""The model and the text that `pqcache demo` carries along; see PROVENANCE.md."""

from pathlib import Path

MODEL = Path(__file__).with_name("tiny")
TEXT = Path(__file__).with_name("articles.txt")
