"""The `pqcache` command: finds the commands in `commands/`, loads the one that is asked for, and nothing else.

Here alone errors become lines and exit codes: 2 for a wrong command line, 1 for what failed, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import click

from hf_pqcache import __version__
from hf_pqcache.cli import commands
from hf_pqcache.cli.commands import _errors, _progress, _unfinished
from hf_pqcache.cli.commands._groups import Group


class _Folder(Group):
    """A group whose commands are the files of `commands/`; a file is imported when its command or its help is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (m.name for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_"))
        return sorted(name.replace("_", "-") for name in names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = cmd_name.replace("_", "-")
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line and, as a program does, end with its exit code."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            _end(_errors.usage_line(error), error.exit_code)
        except click.ClickException as error:
            _end(" ".join(error.format_message().split()), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _end("stopped by Ctrl-C", _errors.INTERRUPTED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # its reader, head or less, has gone
                sys.exit(1)
            if _is_debugging:
                raise
            _end(_errors.explain(error), 1)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        with _progress.tidy_bars():
            try:
                value = super().invoke(ctx)
            except (click.Abort, KeyboardInterrupt):
                _end("; ".join(filter(None, ["stopped by Ctrl-C", _unfinished.told(ctx)])), _errors.INTERRUPTED)
            except Exception:
                _unfinished.note(ctx)
                raise
            _unfinished.finished()
        return value


_is_debugging = False


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    global _is_debugging
    _is_debugging = value


def _end(line: str, code: int) -> None:
    click.echo(f"Error: {line}", err=True)
    sys.exit(code)


@click.group(
    cls=_Folder,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")},
)
@click.version_option(__version__)
@click.option("--debug", is_flag=True, expose_value=False, callback=_debug, help="Show where an error came from.")
def main() -> None:
    """Product-quantized KV cache for Hugging Face transformers.

    Try it:  pqcache demo
    """


if __name__ == "__main__":
    main()
