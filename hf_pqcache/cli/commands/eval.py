"""`pqcache eval`: one measurement of one cache, by task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _types
from hf_pqcache.cli.commands._groups import Group
from hf_pqcache.cli.commands._tasks import ray_option, reads_data, task_of


@click.group(cls=Group)
def command() -> None:
    """Measure a model under one cache, by task.

    Where a task has --ray 4, so many workers share it, of the cluster that RAY_ADDRESS names or of this machine; its rows are
    those of one process. All need a folder in common for --results. `accelerate launch -m hf_pqcache eval ...` does the same.

    \b
    Example:  pqcache eval memory --model tiny --lengths 512 --results rows.jsonl
    """


_task = task_of(command)


def _windows(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--chunk", type=click.IntRange(min=1), help="Tokens a step, in mode cache only; 64 if absent."),
        click.option("--mode", type=click.Choice(["exact", "distort", "stream", "cache"]), help="The cache's own if absent."),
        click.option("--limit", type=click.IntRange(min=1), help="Windows to measure; all if absent."),
        click.option(
            "--prompt", type=click.IntRange(min=1), help="First tokens of a window, at once and unscored; half under --press."
        ),
        click.option("--stride", type=click.IntRange(min=1), help="The next window starts so many tokens later."),
        click.option("--window", type=click.IntRange(min=2), help="Tokens of a window; the model config's if absent."),
        click.option("--split", type=click.Choice(["test", "validation", "train"]), default="test", show_default=True),
        ray_option,
    ):
        function = option(function)
    return function


def _perplexity(task: Any, setup: Any, *, window: int | None, data_dir: Any, **options: Any) -> Any:
    from hf_pqcache.eval.tasks._text import check_perplexity

    chosen = check_perplexity(task, setup, window=window, data_dir=data_dir, **options)
    return lambda session: [task.run(session, window=chosen, data_dir=data_dir, **options)]


@_task
@_windows
@click.option(
    "--dataset",
    type=click.Choice(["wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1"]),
    default="wikitext-2-raw-v1",
    show_default=True,
)
@reads_data()
def wikitext(get: Any, setup: Any, *, dataset: str, **options: Any) -> Any:
    """Perplexity of WikiText.

    \b
    Example:  pqcache eval wikitext --model tiny --data-dir data --limit 1 \\
              --results rows.jsonl
    """
    return _perplexity(get(dataset), setup, **options)


@_task
@_windows
@reads_data()
def ptb(get: Any, setup: Any, **options: Any) -> Any:
    """Perplexity of the Penn Treebank (Mikolov's form).

    \b
    Example:  pqcache eval ptb --model tiny --data-dir data --limit 1 \\
              --results rows.jsonl
    """
    return _perplexity(get("ptb_text_only"), setup, **options)


@_task
@click.option(
    "--tasks", "names", default="all", type=_types.Words(), show_default=True, help="all, e, or names: qasper,lcc,trec_e"
)
@click.option("--limit", type=_types.Limit(), help="First examples of each task only, or a share such as 0.1.")
@click.option(
    "--max-length", "max_tokens", type=click.IntRange(min=2), help="Tokens of a prompt; the rest of the context if absent."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Bound to the official length of an answer.")
@click.option(
    "--chat/--no-chat", "use_chat", default=None, help="Chat template where the official runs have one; if the model has one."
)
@ray_option
@reads_data()
def longbench(get: Any, setup: Any, *, names: list[str], max_tokens: int | None, data_dir: Any, **options: Any) -> Any:
    """LongBench.

    \b
    Example:  pqcache eval longbench --model tiny --data-dir data --tasks qasper \\
              --limit 2 --max-new-tokens 8 --results rows.jsonl
    """
    from hf_pqcache.eval.tasks.longbench import NAMES, NAMES_E

    wanted = {"all": NAMES, "e": NAMES_E}.get(names[0] if len(names) == 1 else "", names)
    chosen = [get(f"longbench/{name}") for name in wanted]
    lengths = [task.check(setup.limit, setup.tokenizer, max_tokens=max_tokens, data_dir=data_dir, **options) for task in chosen]

    def run(session: Any) -> Any:
        pairs = zip(chosen, lengths, strict=True)
        return [row for task, n in pairs for row in task.run(session, max_tokens=n, data_dir=data_dir, **options)]

    return run


@_task
@click.option(
    "--tasks", "names", type=_types.Words(), required=True, help="Tasks, groups or tags of lm-evaluation-harness: piqa,mmlu"
)
@click.option("--include-path", type=_options.FOLDER, help="Folder with more task files.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples shown first; the task's own number if absent.")
@click.option("--limit", type=_types.Limit(), help="First examples of each task only, or a share such as 0.1.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--chunk", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens of an answer scored at once.")
@click.option("--chat/--no-chat", "use_chat", default=False, help="Wrap prompts in the model's chat template.")
@click.option("--gen-kwargs", type=_types.Settings(), help="Of generation: max_gen_toks=16384 for AIME and MATH.")
@click.option("--log-samples", "samples", type=_options.NEW_FOLDER, help="Folder for every prompt, answer and score.")
def harness(get: Any, setup: Any, *, names: list[str], **options: Any) -> Any:
    """Any task of lm-evaluation-harness; `pqcache lm-eval` is its own command line.

    \b
    Example:  pqcache eval harness --model tiny --tasks pqcache_articles \\
              --limit 2 --results rows.jsonl
    """
    task = get("harness")
    task.check(names, options["include_path"])
    return lambda session: task.run(session, names, **options)


def _questions(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--chat/--no-chat", "use_chat", default=None, help="The model's chat template; if it has one."),
        click.option("--max-new-tokens", type=click.IntRange(min=1), help="Bound to the official length of an answer."),
        click.option(
            "--max-length", "max_tokens", type=click.IntRange(min=2), help="Of a prompt; what the model holds if absent."
        ),
        click.option("--limit", type=_types.Limit(), help="First examples only, or a share such as 0.1."),
        ray_option,
    ):
        function = option(function)
    return function


def _ask(tasks: list[Any], setup: Any, **options: Any) -> Any:
    """(session -> rows) of question tasks, once they have been checked."""
    lengths = [task.check(setup.limit, setup.tokenizer, **options) for task in tasks]

    def run(session: Any) -> Any:
        pairs = zip(tasks, lengths, strict=True)
        return [row for task, tokens in pairs for row in task.run(session, **{**options, "max_tokens": tokens})]

    return run


@_task
@_questions
@reads_data()
def longbench_v2(get: Any, setup: Any, **options: Any) -> Any:
    """LongBench v2: four choices over long texts, by difficulty and length.

    \b
    Example:  pqcache eval longbench-v2 --model tiny --data-dir data --limit 2 \\
              --max-new-tokens 8 --results rows.jsonl
    """
    return _ask([get("longbench-v2")], setup, **options)


@_task
@_questions
@click.option(
    "--tasks", "names", default="all", type=_types.Words(), show_default=True, help="all, or passkey,kv_retrieval,..."
)
@reads_data()
def infinitebench(get: Any, setup: Any, *, names: list[str], **options: Any) -> Any:
    """InfiniteBench: retrieval, books, dialogue, code over 100K tokens.

    \b
    Example:  pqcache eval infinitebench --model tiny --data-dir data \\
              --tasks passkey --limit 1 --results rows.jsonl
    """
    from hf_pqcache.eval.tasks.infinitebench import KINDS

    chosen = list(KINDS) if names == ["all"] else names
    return _ask([get(f"infinitebench/{name}") for name in chosen], setup, **options)


@_task
@_options.lengths_option("4K")
@click.option(
    "--tasks", "names", default="all", type=_types.Words(), show_default=True, help="all, or niah_single_1,vt,qa_1,..."
)
@click.option("--count", "limit", type=click.IntRange(min=1), default=20, show_default=True, help="Examples of each cell.")
@ray_option
@reads_data(lambda options: any(name.startswith("qa_") for name in options["names"]))
def ruler(get: Any, setup: Any, *, names: list[str], lengths: list[int] | None, limit: int, data_dir: Any) -> Any:
    """RULER, made for your lengths: all its synthetic tasks, offline; qa_1 and qa_2 over SQuAD and HotpotQA.

    \b
    Example:  pqcache eval ruler --model tiny --tasks niah_single_1,vt \\
              --lengths 512 --count 1 --results rows.jsonl
    """
    from hf_pqcache.eval.measure.ruler import KINDS

    tasks = [get(f"ruler/{name}") for name in (list(KINDS) if names == ["all"] else names)]
    (chosen, *_) = [task.check(setup.limit, lengths=lengths, data_dir=data_dir) for task in tasks]
    options = {"lengths": chosen, "limit": limit, "data_dir": data_dir}
    return lambda session: [row for task in tasks for row in task.run(session, **options)]


@_task
@_options.lengths_option("1K to 128K")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
def speed(get: Any, setup: Any, *, lengths: list[int] | None, new_tokens: int, **options: Any) -> Any:
    """Time to the first token, time per token, tokens per second.

    \b
    Example:  pqcache eval speed --model tiny --cache fp8 --lengths 512 \\
              --new-tokens 8
    """
    from hf_pqcache.eval.measure.lengths import lengths_within

    chosen = lengths_within(setup.limit, lengths, new_tokens, "speed")
    setup.specs[0].check_room(max(chosen) + new_tokens, options["batch"])
    return lambda session: get("speed").run(session, lengths=chosen, new_tokens=new_tokens, **options)


@_task
@_options.lengths_option("1K to 128K")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
def memory(get: Any, setup: Any, *, lengths: list[int] | None, batch: int) -> Any:
    """Bytes of the cache, and the allocator's peak on CUDA.

    \b
    Example:  pqcache eval memory --model tiny --lengths 512 --results rows.jsonl
    """
    from hf_pqcache.eval.measure.lengths import lengths_within

    chosen = lengths_within(setup.limit, lengths, 0, "memory")
    setup.specs[0].check_room(max(chosen), batch)
    return lambda session: get("memory").run(session, lengths=chosen, batch=batch)


def _is_text_of_data_set(options: dict[str, Any]) -> bool:
    from hf_pqcache.eval.session.texts import is_data_set

    return is_data_set(options["text"])


@_task
@_options.lengths_option("1K and 2K")
@click.option(
    "--depths",
    type=_types.Numbers(float, 0, 1),
    default="0,0.25,0.5,0.75,1",
    show_default=True,
    help="Where: 0 first, 1 last.",
)
@click.option("--count", type=click.IntRange(min=1), default=4, show_default=True, help="Pass keys for every cell.")
@click.option(
    "--question-after", is_flag=True, help="Ask in a turn of its own: what prunes the text does not know the question."
)
@_options.text_option("Filler")
@ray_option
@click.option("--plot", type=_options.FILE, help="Draw recall over depth and length here (PNG; needs matplotlib).")
@reads_data(_is_text_of_data_set)
def recall(
    get: Any,
    setup: Any,
    *,
    data_dir: Any,
    lengths: list[int] | None,
    depths: list[float],
    text: str,
    count: int,
    question_after: bool,
    plot: Path | None,
) -> Any:
    """Pass keys over depth and length.

    \b
    Example:  pqcache eval recall --model tiny --lengths 256,512 --count 1 \\
              --results rows.jsonl --plot recall.png
    """
    from hf_pqcache.eval.measure.lengths import lengths_within
    from hf_pqcache.eval.measure.recall import ANSWER_TOKENS, check_recall
    from hf_pqcache.eval.session.distributed import is_main
    from hf_pqcache.eval.session.models import token_ids
    from hf_pqcache.eval.session.texts import text_of

    filler, _ = text_of(text, data_dir)
    chosen = lengths_within(setup.limit, lengths, ANSWER_TOKENS, "recall", offered=(1024, 2048))
    setup.specs[0].check_room(max(chosen) + ANSWER_TOKENS)
    check_recall(setup.tokenizer, token_ids(setup.tokenizer, filler), chosen, depths, setup.limit)
    _output.check_writable(plot)

    def run(session: Any) -> Any:
        asked = {"lengths": chosen, "depths": depths, "count": count, "question_after": question_after}
        rows = get("recall").run(session, filler, **asked)
        if plot is not None and is_main():
            from hf_pqcache.eval.report.charts import recall_maps
            from hf_pqcache.eval.report.plots import save_png

            was_there = plot.exists()
            save_png(recall_maps(rows)[0], plot)
            _output.say(_output.written(plot, was_there))
        return rows

    return run


@_task
@click.option("--tokens", type=click.IntRange(min=2), help="Of the prompt; 2048, or what the model holds, if absent.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True)
def breakdown(get: Any, setup: Any, *, tokens: int | None, steps: int, batch: int) -> Any:
    """Where the time of a decode step goes.

    \b
    Example:  pqcache eval breakdown --model tiny --tokens 512 --steps 4 \\
              --results rows.jsonl
    """
    from hf_pqcache.eval.measure.breakdown import WARM_UP
    from hf_pqcache.eval.measure.lengths import lengths_within

    asked = None if tokens is None else (tokens,)
    (chosen,) = lengths_within(setup.limit, asked, WARM_UP + steps, "a breakdown", offered=(2048,))
    setup.specs[0].check_room(chosen + WARM_UP + steps, batch)
    return lambda session: get("breakdown").run(session, tokens=chosen, batch=batch, steps=steps)
