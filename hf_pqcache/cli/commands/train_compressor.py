"""`pqcache train-compressor`: a learnt press for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output


@click.command()
@_options.only_model_options
@_options.text_option("To learn from")
@click.option(
    "--images",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help='In place of --text: JSON lines {"image": FILE or [FILE, ...], "text": TEXT}, for a model that takes images.',
)
@click.option("--data-dir", type=_options.FOLDER, help="Folder with the data sets' plain files, instead of the Hub.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=500, show_default=True, help="Up to which; fewer are gone on from."
)
@click.option("--factor", type=click.IntRange(min=2), default=4, show_default=True, help="Neighbouring tokens that become one.")
@click.option("--sinks", type=click.IntRange(min=0), default=4, show_default=True, help="First tokens that stay.")
@click.option(
    "--recent", type=click.IntRange(min=0), default=64, show_default=True, help="Newest tokens of a prompt that stay."
)
@click.option(
    "--prompt", type=click.IntRange(min=2), default=384, show_default=True, help="Tokens of a text's window to compress."
)
@click.option("--answer", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to predict behind them.")
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Windows, or lines, a step.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=5e-4, show_default=True, help="Of Adam.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and windows.")
@click.option("-o", "--output", type=_options.NEW_FOLDER, default=Path("compressor"), show_default=True, help="Its folder.")
@click.option("--plot", type=_options.FILE, help="Draw the loss here (PNG; needs matplotlib).")
@_options.json_option("losses and settings")
@_options.quiet_option()
def command(
    text: str,
    images: Path | None,
    data_dir: Path | None,
    output: Path,
    plot: Path | None,
    json_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a press that merges neighbouring tokens, the model frozen, and compare it with presses that prune as much.

    A run that is repeated goes on where --output stands. Use what it made with --press mlp:FOLDER. One that learnt from text
    alone leaves tokens of images as they are; for those, too:

    \b
              pqcache train-compressor --model llava-hf/llava-1.5-7b-hf \\
              --images captions.jsonl --answer 32 -o compressor

    \b
    Example:  pqcache train-compressor --model tiny --steps 20 --prompt 128 \\
              --answer 32 -o compressor --plot loss.png
    """
    from tqdm.auto import tqdm

    from hf_pqcache.compressors.training import Training
    from hf_pqcache.eval.learnt_press import learn, loss_curve
    from hf_pqcache.eval.session.models import token_ids
    from hf_pqcache.eval.session.pictures import samples_of
    from hf_pqcache.eval.session.texts import text_of
    from hf_pqcache.models.processor import load_processor

    if images is not None:
        _options.refuse_unused("beside --images", {"text": "--text", "prompt": "--prompt"})
    for path in (output, plot, json_file):
        _output.check_writable(path)
    made = {name: options.pop(name) for name in ("steps", "factor", "sinks", "recent")}
    training = Training(**{name: options.pop(name) for name in ("prompt", "answer", "batch", "rate", "seed")})
    words, source = ("", images.name) if images is not None else text_of(text, data_dir)
    revision = options["revision"]
    session = _options.open_model(options, data_dir=data_dir, is_quiet=quiet)
    data: Any = token_ids(session.tokenizer, words)
    if images is not None:
        processor = load_processor(session.model.config._name_or_path, revision)
        data = samples_of(images, processor, session.model.config, training.answer)
    with tqdm(total=made["steps"], desc="training", unit="step", disable=quiet, leave=False) as bar:

        def show(step: int, loss: float) -> None:
            bar.update(step + 1 - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        losses, held_out = learn(session.model, data, training, folder=output, show=show, **made)
    _output.show_table(
        f"{session.model_name}, {source}, nats a token lost behind prompts that nothing was learnt from",
        {"press": list(held_out), "loss": [f"{value:.4f}" for value in held_out.values()]},
    )
    _output.say(f"{len(losses)} steps, in {output}: use it with --press mlp:{output}")
    if plot is not None:
        _output.say(_output.written(plot, _output.save_bytes(plot, loss_curve(losses, held_out))))
    _output.write_json(json_file, {"text": source, **made, "losses": losses, "held_out": held_out})
