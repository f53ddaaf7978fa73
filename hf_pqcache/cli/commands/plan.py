"""`pqcache plan`: what a cache will take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _types

_FITTED = ("dynamic", "pq:4", "pq:3", "pq:2", "pq")


@click.command()
@click.argument("model")
@click.option("--tokens", type=_types.Length(), default="128K", show_default=True, help="Of each sequence: 131072 or 128K.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@_options.apply_shape
@click.option("--revision", help="Commit, branch or tag of the model.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model's config.")
@click.option("--no-weights", is_flag=True, help="Do not count the model's weights: a card holds the cache alone.")
@_options.json_option("the plan")
@_options.quiet_option()
def command(
    model: str,
    tokens: int,
    batch: int,
    revision: str | None,
    trust_remote_code: bool,
    no_weights: bool,
    json_file: Path | None,
    quiet: bool,
    **shape: Any,
) -> None:
    """Bytes of every cache for MODEL, and which card holds them, from its config alone.

    MODEL is a folder, a config.json, a model config or a Hub id, of which only config.json is read.

    \b
    Example:  pqcache plan tiny --tokens 131072 --batch 4
    """
    from hf_pqcache.cache.footprint import plan_memory
    from hf_pqcache.eval.report.naming import format_value
    from hf_pqcache.eval.session.cards import CARDS, GIB, LEFT, tokens_that_fit, weight_bytes
    from hf_pqcache.eval.session.model_config import load_model_config
    from hf_pqcache.eval.session.models import load_config

    described = load_model_config(model, {**shape, "revision": revision})
    config = load_config(described.source, revision=described.revision, trust_remote_code=trust_remote_code)
    settings = described.pq_config
    planned = plan_memory(config, tokens=tokens, batch=batch, pq_config=settings)
    exact = planned.caches[0].total
    same = {x.total for x in planned.caches if x.cache.startswith("pq:")}
    found = [x for x in planned.caches if x.cache != "pq" or x.total not in same]
    _output.show_table(
        f"{model}: {batch} x {tokens:,} tokens, {planned.compressed_layers} layers that keep every token",
        {
            "cache": [x.cache for x in found],
            "bytes": [format_value(x.total, "bytes") for x in found],
            "saved": ["" if x.total >= exact else format_value(exact - x.total, "bytes") for x in found],
            "of exact": [f"{x.total / exact:.1%}" for x in found],
            "bits": [f"{planned.bits(x.cache):.2f}" for x in found],
            "pages": [f"{x.pages:,}" if x.pages else "" for x in found],
            "window": [format_value(x.window, "bytes") if x.window else "" for x in found],
            "tables": [format_value(x.tables, "bytes") if x.tables else "" for x in found],
            "codebooks": [format_value(x.codebooks, "bytes") if x.codebooks else "" for x in found],
        },
        notes=planned.notes,
    )
    weights = 0 if no_weights else weight_bytes(config, trust_remote_code)
    fitted = [x.cache for x in found if x.cache in _FITTED]
    cards: dict[str, dict[str, int]] = {}
    for card, size in CARDS.items():
        room = size * GIB * (1 - LEFT) - weights
        cards[card] = (
            tokens_that_fit(config, fitted, room, batch=batch, pq_config=settings) if room > 0 else dict.fromkeys(fitted, 0)
        )
    _output.show_table(
        "Tokens of each sequence that fit on a card (* as many as asked for)",
        {
            "card": list(cards),
            **{name: [_tokens(held[name], tokens) for held in cards.values()] for name in fitted},
        },
        notes=[
            f"{format_value(weights, 'bytes')} of weights" * (not no_weights)
            + f"; {LEFT:.0%} of a card is left to activations and CUDA"
        ],
    )
    document = {**planned.to_dict(), "weights": weights, "cards": cards}
    _output.write_json(json_file, document)


def _tokens(held: int, wanted: int) -> str:
    """Tokens that fit, in thousands where there are many."""
    if held < 1:
        return "-"
    return (f"{held / 1024:,.0f}K" if held >= 10240 else f"{held:,}") + ("*" if held >= wanted else " ")
