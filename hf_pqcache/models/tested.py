"""The releases of transformers and torch that the tests passed with; imports neither, and knows nothing else of them."""

from __future__ import annotations

import importlib.metadata

#: package -> its oldest and its newest tested release. The oldest is also what pyproject.toml asks for.
RANGES = {"transformers": ("5.17", "5.24"), "torch": ("2.8", "2.13")}


def _minor(version: str) -> tuple[int, int]:
    """ "5.24.0.dev0" -> (5, 24)"""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def range_text(package: str) -> str:
    """Such as "5.17 to 5.24"."""
    return " to ".join(RANGES[package])


def is_newer(package: str, version: str) -> bool:
    """Whether this release of a package of RANGES is newer than every one that was tested."""
    return _minor(version) > _minor(RANGES[package][1])


def newest_tested(package: str) -> str:
    """The line that installs it."""
    return f'pip install "{package}=={RANGES[package][1]}.*"'


def explain(error: ImportError) -> ImportError:
    """An ImportError of something that transformers should have, with the versions that have it; others unchanged."""
    if (error.name or "").partition(".")[0] != "transformers":
        return error
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return error
    return ImportError(
        f"transformers {installed} lacks what hf_pqcache uses of it ({error}). Tested are {range_text('transformers')}; "
        f"type: {newest_tested('transformers')}",
        name=error.name,
        path=error.path,
    )
