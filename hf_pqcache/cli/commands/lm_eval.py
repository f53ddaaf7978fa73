"""`pqcache lm-eval`: the command line of lm-evaluation-harness, which then knows the model `hf-pqcache`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import click


def _needs_model(words: list[str]) -> bool:
    """Whether the command line will run a model: its helps and lists come at once."""
    return bool(words) and words[0] not in ("ls", "validate") and not {"-h", "--help"} & set(words)


def _check_model_args(words: list[str]) -> None:
    """Refuse a wrong --model_args before the harness reads thousands of task files. Raises ValueError or OSError."""
    joined = "\n".join(words).replace("--model-args", "--model_args").replace("--model_args=", "--model_args\n").split("\n")
    if "hf-pqcache" not in joined or "--model_args" not in joined[:-1]:
        return
    given = dict(pair.partition("=")[::2] for pair in joined[joined.index("--model_args") + 1].split(","))
    from hf_pqcache.eval.session.caches import check_name
    from hf_pqcache.eval.session.model_config import load_model_config

    check_name(given.get("cache", "pq"))
    if "pretrained" in given:
        load_model_config(given["pretrained"])


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
@click.pass_context
def command(context: click.Context) -> None:
    """Everything that `lm_eval` does, with the model hf-pqcache; its own --help has the options.

    \b
    Example:  pqcache lm-eval --model hf-pqcache \\
              --model_args pretrained=tiny,cache=fp8 --tasks pqcache_articles --limit 2
    """
    if find_spec("lm_eval") is None:
        raise click.ClickException("lm-evaluation-harness is not installed; type: pip install 'hf-pqcache[harness]'")
    from lm_eval.__main__ import cli_evaluate

    if _needs_model(context.args):
        _check_model_args(context.args)
        import hf_pqcache.eval.measure.harness  # noqa: F401  registers the model

    from hf_pqcache.eval.harness_tasks import FOLDER

    words = list(context.args)
    if _needs_model(words) and not any(word.split("=")[0] in ("--include_path", "--include-path") for word in words):
        words += ["--include_path", str(FOLDER)]
    before = sys.argv
    sys.argv = ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
