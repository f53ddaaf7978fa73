"""LongBench's way from an example to a prediction: prompt, truncation, chat template, generation; knows no score and no row.

Prompts, generation lengths and names of metrics come at run time from the task files of the installed
lm-evaluation-harness; its scores are not used (`longbench_scores` says why).
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_pqcache.eval.session import hub_data
from hf_pqcache.models.names import cache_kwargs

#: Tasks whose examples are a continued pattern or code: the official runs give them to chat models as plain text.
PLAIN_TASKS = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")


@dataclass(frozen=True)
class Spec:
    """What the harness says of a task.

    Attributes:
        template: Jinja prompt over `context` and `question`. max_new_tokens: length of an answer.
        metric: name of the score, as "qa_f1_score". path, config: of the data set on the Hub. version: of the task file.
    """

    template: str
    max_new_tokens: int
    metric: str
    path: str
    config: str
    version: str


class _Loader(yaml.SafeLoader):
    """Reads the harness's files without importing the functions that they name."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


@cache
def spec(task: str) -> Spec:
    """The harness's description of a task ("qasper", "qasper_e", ...).

    Raises ImportError if the harness is not installed, ValueError if it does not have the task in the form expected.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ImportError("LongBench's prompts come from lm-evaluation-harness; type: pip install 'hf-pqcache[longbench]'")
    path = Path(found.submodule_search_locations[0], "tasks", "longbench", f"{task}.yaml")
    if not path.is_file():
        raise ValueError(f"the installed lm-evaluation-harness has no {path.name}; update it: pip install -U lm_eval")
    values: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    try:
        metric = next(x["metric"] for x in reversed(values["metric_list"]) if x["metric"] != "score")
        return Spec(
            template=values["doc_to_text"],
            max_new_tokens=int(values["generation_kwargs"]["max_gen_toks"]),
            metric=metric,
            path=values["dataset_path"],
            config=values["dataset_name"],
            version=str(values["metadata"]["version"]),
        )
    except (KeyError, StopIteration, TypeError) as error:
        raise ValueError(f"{path} lacks {error}: this version of lm-evaluation-harness describes tasks differently") from error


def examples(task: str, data_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """The task's test examples, from `<task>.jsonl` as published or from the Hub.

    Raises FileNotFoundError if data_dir has no such file.
    """
    if data_dir is None:
        described = spec(task)
        return [dict(row) for row in hub_data.load(described.path, described.config, split="test")]
    path = examples_file(task, data_dir)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def examples_file(task: str, data_dir: str | Path) -> Path:
    """Where a folder has the task's examples. Raises FileNotFoundError if it has none."""
    for folder in (Path(data_dir), Path(data_dir, "longbench"), Path(data_dir, "data")):
        if (path := folder / f"{task}.jsonl").is_file():
            return path
    raise FileNotFoundError(f"{data_dir} holds no {task}.jsonl, neither in itself nor in longbench/ or data/")


def prompt(task: str, example: dict[str, Any]) -> str:
    """The official prompt of an example."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(spec(task).template)
    question = example["input"] if "input" in example else example["question"]
    return template.render(context=example["context"], question=question)


def prompt_ids(tokenizer: Any, text: str, task: str, max_tokens: int, use_chat: bool) -> torch.Tensor:
    """Token ids int64 (1, n) of a prompt, its middle cut out beyond `max_tokens`, then in the model's chat template.

    As officially, the template's own tokens come on top of max_tokens, and PLAIN_TASKS get none.
    """
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if len(ids) > max_tokens:
        half = max_tokens // 2
        text = tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(ids[-half:], skip_special_tokens=True)
    if use_chat and task.removesuffix("_e") not in PLAIN_TASKS:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    return torch.tensor([tokenizer(text, truncation=False, verbose=False)["input_ids"]])


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, ids: torch.Tensor, task: str, max_new_tokens: int, cache: Any) -> str:
    """Greedy continuation of ids int64 (1, n). samsum also ends at a line end, which must not come first."""
    ids = ids.to(model.device)
    more: dict[str, Any] = {}
    if task.removesuffix("_e") == "samsum":
        line_end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        more = {"min_new_tokens": 1, "eos_token_id": [tokenizer.eos_token_id, line_end]}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_kwargs(cache),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **more,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
