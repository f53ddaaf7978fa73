"""`pqcache generate`: your own prompt under an exact and a compressed cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_pqcache.cli.commands import _options, _output, _streams

if TYPE_CHECKING:
    from hf_pqcache.eval.measure.answers import Answer


@click.command()
@_options.session_options
@click.option("--prompt", help="The text to go on from.")
@click.option("--file", "prompt_file", type=_options.FILE, help="A file with it, UTF-8; - is the input.")
@click.option("--chat", "is_chat", is_flag=True, help="Talk: a line of the input is a turn; an empty one or Ctrl-D ends it.")
@click.option(
    "--template/--no-template", default=None, help="The model's chat template; if absent, in a chat where it has one."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True, help="To sample from."
)
@click.option("--no-exact", is_flag=True, help="Leave out the exact cache's answer.")
def command(
    prompt: str | None,
    prompt_file: Path | None,
    is_chat: bool,
    template: bool | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    no_exact: bool,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Answer a prompt with an exact and a compressed cache, side by side.

    Texts appear as they are made, a token of each in turn: in two columns on a terminal of 100 or more, else in lines that
    take turns. Tokens a second (each by its own clock) and bytes follow.

    \b
    Example:  pqcache generate --model tiny --prompt "The owl is" \\
              --max-new-tokens 32 --codebook codebook
    """
    if (prompt is not None) + (prompt_file is not None) + is_chat != 1:
        raise click.UsageError("give one of --prompt TEXT, --file FILE and --chat")
    from hf_pqcache.eval.measure.answers import answers, prompt_ids
    from hf_pqcache.eval.session.caches import CacheSpec
    from hf_pqcache.models.positions import check_positions

    text = prompt if prompt_file is None else _read(prompt_file)
    cache = _options.cache_of(options)
    if temperature == 0:
        _options.refuse_unused("at temperature 0, where nothing is sampled", {"top_p": "--top-p"})
    if cache == "dynamic":
        _options.refuse_unused("beside --cache dynamic, which is the exact one", {"no_exact": "--no-exact"})
    for name in ("results", "force"):
        if options[name]:
            raise click.UsageError(f"--{name} keeps figures of tasks; generate has none")
    setup = _options.setup_of(options, [cache], [json_file])
    use_template = (is_chat and bool(getattr(setup.tokenizer, "chat_template", None))) if template is None else template
    if text is not None:
        ids = prompt_ids(setup.tokenizer, [{"role": "user", "content": text}], use_template)
        _check_room(check_positions, ids.shape[1], max_new_tokens, setup.limit)
    session = setup.ready(setup.open(), setup.specs[0])
    specs = [session.cache] if no_exact or session.cache.name == "dynamic" else [CacheSpec("dynamic"), session.cache]
    histories: list[list[dict[str, str]]] = [[] for _ in specs]
    told: list[list[Answer]] = []
    for turn in [text] if text is not None else _turns():
        asked = []
        for spec, history in zip(specs, histories, strict=True):
            history.append({"role": "user", "content": turn})
            ids = prompt_ids(session.tokenizer, history, use_template)
            _check_room(check_positions, ids.shape[1], max_new_tokens, setup.limit)
            asked.append((ids, spec))
        sampling = {"temperature": temperature, "top_p": top_p, "seed": session.seed}
        _output.say("")
        with _streams.side_by_side([spec.label for spec in specs]) as streams:
            options = {"max_new_tokens": max_new_tokens, "show": streams.show, **sampling}
            with session.cache.pressing(session.model):
                found = answers(session.model, session.tokenizer, asked, **options)
        for one, history in zip(found, histories, strict=True):
            history.append({"role": "assistant", "content": one.text})
        _print(found)
        told.append(found)
    document = {"model": session.model_name, "turns": [[asdict(one) for one in found] for found in told]}
    _output.write_json(json_file, document)


def _check_room(check: Any, tokens: int, new: int, limit: int | None) -> None:
    check(tokens + new, limit, f"a prompt of {tokens} tokens and {new} new ones", "the prompt or --max-new-tokens")


def _read(path: Path) -> str:
    from hf_pqcache.eval.session.texts import read_text

    return sys.stdin.read() if path == _output.STDOUT else read_text(path)


def _turns() -> Iterator[str]:
    """Lines of the input until an empty one; on a terminal a prompt stands before each."""
    while True:
        if sys.stdin.isatty():
            click.echo("\nyou: ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def _print(answers: list[Answer]) -> None:
    from hf_pqcache.eval.measure.answers import same_tokens

    first = answers[0]
    notes = []
    if any(x.kv_bytes > first.kv_bytes for x in answers):
        notes.append("so short a text lies in the exact window, which is taken whole: bytes are saved on long ones")
    _output.say("")
    _output.show_table(
        f"{first.prompt_tokens} tokens of prompt",
        {
            "cache": [x.cache for x in answers],
            "new": [str(len(x.tokens)) for x in answers],
            "first s": [f"{x.first_s:.2f}" for x in answers],
            "tokens/s": ["" if x.tokens_per_s is None else f"{x.tokens_per_s:.1f}" for x in answers],
            "KV": [_output.bytes_text(x.kv_bytes) for x in answers],
            "codebooks": [_output.bytes_text(x.codebook_bytes) if x.codebook_bytes else "" for x in answers],
            "of first": ["" if x is first else f"{x.kv_bytes / first.kv_bytes:.1%}" for x in answers],
            "same": ["" if x is first else str(same_tokens(first.tokens, x.tokens)) for x in answers],
        },
        notes=["same: tokens before the answers part", *notes],
    )
