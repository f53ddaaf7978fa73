"""`pqcache publish`: a codebook, its results and a model card become one commit on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_pqcache.cli.commands import _options, _output

_SETTINGS = ("page_size", "extended_residual", "sink_tokens")


@click.command()
@click.argument("codebook", type=_options.FOLDER)
@click.option("--repo", required=True, help="Repository, user/name; made if need be.")
@click.option("--results", multiple=True, type=_options.FILE, help="JSONL file of result rows; may be given again.")
@click.option("--license", required=True, help="As the Hub calls it: mit, llama3.1, ... Mind that of the base model.")
@click.option(
    "-f", "--config", "model_config", help="Model config whose page size and window to recommend; the codebook's own if absent."
)
@click.option("--dry-run", type=_options.NEW_FOLDER, help="Write the files here; no network.")
@click.option("--private", is_flag=True, default=None, help="Make a private repository.")
@click.option("--revision", help="Branch to commit to, made if need be; main if absent.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@_options.json_option("address and file names")
def command(
    codebook: Path,
    repo: str,
    results: tuple[Path, ...],
    license: str,
    model_config: str | None,
    dry_run: Path | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    json_file: Path | None,
) -> None:
    """Publish a codebook with its results, plots, model card and generate recipe. Log in first: hf auth login

    \b
    Example:  pqcache publish codebook --repo me/tiny-pq4 --license mit \\
              --dry-run preview
    """
    from hf_pqcache.eval.publish import publish, worth
    from hf_pqcache.eval.session.model_config import load_model_config

    if dry_run is not None:
        flags = {"private": "--private", "revision": "--revision", "create_pr": "--create-pr"}
        _options.refuse_unused("with --dry-run, which asks the Hub nothing", flags)
    config = load_model_config(model_config) if model_config is not None else None
    settings: dict[str, Any] | None = None if config is None else {name: getattr(config, name) for name in _SETTINGS}
    was_there = dry_run is not None and dry_run.is_dir() and any(dry_run.iterdir())
    address, files = publish(
        codebook,
        repo,
        results,
        license=license,
        settings=settings,
        dry_run=dry_run,
        private=private,
        revision=revision,
        create_pr=create_pr,
    )
    for name in files:
        _output.say(f"  {name}")
    if told := worth(codebook):
        _output.say(f"note: {told}")
    _output.say(_output.written(Path(address), was_there) if dry_run else f"published: {address}")
    _output.write_json(json_file, {"address": address, "files": files})
