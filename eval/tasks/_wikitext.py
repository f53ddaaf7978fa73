"""What the WikiText data sets (Merity et al. 2016) have in common."""

from __future__ import annotations

from hf_pqcache.eval.tasks._text import TextTask


def _rows(lines: list[str]) -> list[str]:
    """The Hub's rows: one a line, its line end kept, and empty where a line is blank."""
    return [line if line.strip() else "" for line in lines]


def wikitext(config: str, folder: str, suffix: str) -> TextTask:
    """Rows joined by two line ends, as in GPTQ (Frantar et al. 2022) and all that compare themselves with it."""
    return TextTask(
        name=config,
        version="1",
        files={"train": f"wiki.train.{suffix}", "validation": f"wiki.valid.{suffix}", "test": f"wiki.test.{suffix}"},
        folders=(config, folder),
        path="Salesforce/wikitext",
        config=config,
        column="text",
        rows=_rows,
        join="\n\n".join,
    )
