"""Perplexity of the Penn Treebank (Marcus et al. 1993) in Mikolov's form: lower case, <unk>, N for numbers."""

from hf_pqcache.eval.tasks._text import TextTask

task = TextTask(
    name="ptb_text_only",
    version="1",
    files={"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"},
    folders=("ptb_text_only", "simple-examples/data"),
    path="ptb-text-only/ptb_text_only",
    config=None,
    revision="refs/convert/parquet",  # the data set's own files are a script, which `datasets` no longer runs
    column="sentence",
    rows=lambda lines: [line.strip() for line in lines],
    join=" ".join,
)
