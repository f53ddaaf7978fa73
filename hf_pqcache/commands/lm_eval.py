"""`pqcache lm-eval`: the command line of lm-evaluation-harness, which then knows the model `hf-pqcache`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import click


def _needs_model(words: list[str]) -> bool:
    """Whether the command line will run a model: its helps and lists come at once."""
    return bool(words) and words[0] not in ("ls", "validate") and not {"-h", "--help"} & set(words)


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
@click.pass_context
def command(context: click.Context) -> None:
    """Everything that `lm_eval` does, with the model hf-pqcache; its own --help has the options.

    \b
    Example:  pqcache lm-eval --model hf-pqcache --model_args pretrained=tiny,cache=pq:4 --tasks piqa --limit 10
    """
    if find_spec("lm_eval") is None:
        raise click.ClickException("lm-evaluation-harness is not installed; type: pip install 'hf-pqcache[harness]'")
    from lm_eval.__main__ import cli_evaluate

    if _needs_model(context.args):
        import hf_pqcache.eval.harness  # noqa: F401  registers the model

    before = sys.argv
    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
