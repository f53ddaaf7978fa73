"""What went wrong, as one line that its user can act on; knows no command."""

from __future__ import annotations

import errno

import click

from hf_pqcache.errors import PQCacheError

#: What a wrong input or a machine that lacks something raises; anything else is a fault of ours.
EXPECTED = (PQCacheError, ValueError, OSError, ImportError, MemoryError)
INTERRUPTED = 130
_PLAIN = {
    errno.ENOSPC: "no space left on the device",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "it is there already",
}


def explain(error: BaseException) -> str:
    """One line about any error but click's own. What nobody expected is said to be so, and how to see where it came from."""
    if isinstance(error, OSError) and error.errno in _PLAIN:
        return ": ".join(filter(None, [_one_line(error.filename or ""), _PLAIN[error.errno]]))
    text = _one_line(str(error))
    is_expected = isinstance(error, EXPECTED) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    if is_expected and text:
        return text
    return f"{type(error).__name__}: {text} (not foreseen; `pqcache --debug ...` shows where it came from)"


def usage_line(error: click.UsageError) -> str:
    """A wrong command line, and which help tells the right one."""
    where = f" (see: {error.ctx.command_path} --help)" if error.ctx is not None else ""
    return _one_line(error.format_message()).removesuffix(".") + where


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
