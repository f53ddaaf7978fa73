"""The `pqcache` command: finds the commands in `commands/`, loads the one that is asked for, and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import click

from hf_pqcache import commands
from hf_pqcache.errors import PQCacheError


class _Folder(click.Group):
    """A group whose commands are the files of `commands/`; a file is imported when its command or its help is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (m.name for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))
        return sorted(name.replace("_", "-") for name in names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PQCacheError as error:  # what its user can mend; anything else shows where it came from
            raise click.ClickException(str(error)) from error


@click.group(cls=_Folder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf-pqcache")
def main() -> None:
    """Product-quantized KV cache for Hugging Face transformers.

    Try it:  pqcache demo
    """


if __name__ == "__main__":
    sys.exit(main())
