"""The version of the installed distribution."""

from __future__ import annotations


def read_version() -> str:
    """Return the installed version, or 'source' when run from a tree that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("lightpress")
    except metadata.PackageNotFoundError:
        return "source"
