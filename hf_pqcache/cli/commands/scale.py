"""`pqcache scale`: how many cards keep a million conversations going, before there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output, _types


@click.command()
@click.argument("model", required=False)
@click.option("--conversations", type=click.IntRange(min=1), default=10**6, show_default=True, help="That go on at a time.")
@click.option("--tokens", type=_types.Length(), default="32K", show_default=True, help="Of each.")
@click.option("--shared", type=_types.Length(), default="4K", show_default=True, help="Of its first ones, common to all.")
@click.option("--think", type=click.FloatRange(min=1), default=300, show_default=True, help="Seconds between two turns.")
@click.option("--question", type=click.IntRange(min=1), default=200, show_default=True, help="Tokens of a question.")
@click.option("--answer", type=click.IntRange(min=1), default=300, show_default=True, help="Tokens of an answer.")
@click.option("--most-ms", type=click.FloatRange(min=1), default=50, show_default=True, help="Most from a token to the next.")
@click.option("--memory", type=click.FloatRange(min=1), default=79, show_default=True, help="GiB of a card.")
@click.option("--host", type=click.FloatRange(min=0), default=256, show_default=True, help="GiB of host memory a card.")
@click.option("--disk", type=click.FloatRange(min=0), default=3840, show_default=True, help="GiB of disk a card.")
@click.option(
    "--price", type=click.FloatRange(min=0), default=2.5, show_default=True, help="Of a card's hour, in your currency."
)
@click.option("--revision", help="Commit, branch or tag of the model.")
@click.option("--simulate", is_flag=True, help="Also simulate a card of each row for an hour.")
@click.option("--plot", type=_options.FILE, help="Draw the cards here, as PNG or SVG.")
@_options.json_option("the rows")
@_options.quiet_option()
def command(
    model: str | None,
    conversations: int,
    memory: float,
    host: float,
    disk: float,
    price: float,
    revision: str | None,
    simulate: bool,
    plot: Path | None,
    json_file: Path | None,
    quiet: bool,
    most_ms: float,
    **use: Any,
) -> None:
    """Cards for many conversations at 16, 4, 3 and 2 bits, what bounds them, and the cost of a million tokens.

    MODEL is what `pqcache plan` takes; the shape of Llama-3.1-8B if absent. Speeds are those of one H100 as eval/RESULTS.md
    has them; eval/SCALE.md says what is assumed besides.

    \b
    Example:  pqcache scale --tokens 32K --shared 4K --think 300
    """
    from hf_pqcache.eval.scale import plan
    from hf_pqcache.eval.session.model_config import load_model_config
    from hf_pqcache.eval.session.models import load_config

    _output.check_writable(plot)
    if model is None:
        config = plan.llama_8b()
    else:
        described = load_model_config(model, {"revision": revision})
        config = load_config(described.source, revision=described.revision)
    wanted = plan.Use(most=most_ms / 1000, **use)
    if wanted.shared >= wanted.tokens:
        raise click.BadParameter(f"{wanted.shared} of {wanted.tokens} tokens cannot be shared", param_hint="--shared")
    gib = plan.GIB * plan.FILLED
    card = plan.card_of(config, memory, host=host * gib, disk=disk * gib, price=price)
    if card.memory <= 0:
        raise click.BadParameter(f"the model's weights do not fit into {memory:g} GiB", param_hint="--memory")
    rows = plan.table(config, card, wanted, conversations)
    if simulate:
        _simulate(rows, config, card, wanted)
    told = f"{conversations:,} conversations of {wanted.tokens:,} tokens, {wanted.shared:,} of them shared"
    _output.show_table(f"{model or 'Llama-3.1-8B'}: {told}", _columns(rows, simulate))
    _output.write_json(json_file, {"card": vars(card), "use": vars(wanted), "rows": rows})
    if plot is not None:
        from hf_pqcache.eval.scale.plot import draw

        draw(rows, f"{told}: cards").savefig(plot, dpi=110)


def _simulate(rows: list[dict[str, Any]], config: Any, card: Any, use: Any) -> None:
    from hf_pqcache.eval.scale import plan
    from hf_pqcache.eval.scale.simulation import simulate

    for row in rows:
        used, tier = plan.kinds(use)[row["where"]]
        one = plan.conversation(config, row["bits"], used, card)
        if 0 < row["per_card"] <= plan.MOST_SIMULATED:
            row["simulated_step_ms"] = 1e3 * simulate(card, one, used, row["per_card"], tier).step


def _columns(rows: list[dict[str, Any]], simulated: bool) -> dict[str, list[str]]:
    found = {
        "idle conversations": [row["where"] for row in rows],
        "bits": [str(row["bits"]) for row in rows],
        "bytes": [_output.bytes_text(row["bytes"]) for row in rows],
        "a card": [f"{row['per_card']:,}" for row in rows],
        "bound by": [row["bound"] for row in rows],
        "cards": [f"{row['cards']:,}" if row["per_card"] else "-" for row in rows],
        "ms a token": [f"{row['step_ms']:.1f}" for row in rows],
        "cost of 1M": ["-" if row["cost"] is None else f"{row['cost']:.2f}" for row in rows],
    }
    if simulated:
        found["simulated ms"] = [f"{row['simulated_step_ms']:.1f}" if "simulated_step_ms" in row else "-" for row in rows]
    return found
