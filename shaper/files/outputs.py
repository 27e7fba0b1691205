"""Whether a run of minutes can write what it will find, asked before it starts."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

from shaper.errors import ConfigError, MissingPackageError


def check_output(path: Path | None, flag: str, *suffixes: str) -> None:
    """Say before a run of minutes that its result can't be written.

    Args:
        path: where it goes; None: nowhere.
        flag: that gave it, for the message.
        suffixes: one of which it must end in; none: any.

    Raises:
        ConfigError: it ends otherwise, its directory is not there, or it can't be written.
    """
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"{flag} {path}: the file must end in {' or '.join(suffixes)}")
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"{flag} {path} can't be written: it is a directory; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{flag} {path}: this user may not write it")
    check_directory(folder, f"{flag} {path}")


def check_directory(folder: Path, flag: str) -> None:
    """Say before a run of minutes that nothing can be written in a directory.

    Raises:
        ConfigError: it is not there, or a file can't be made in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{flag}: there is no directory {folder}; make it first")
    try:
        # The only answer that counts: permissions say nothing of a read-only disk, or to root.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{flag}: no file can be made in {folder}: {error.strerror}") from error


def check_package(name: str, what: str) -> None:
    """Say before a run of minutes that it needs an optional package.

    Args:
        name: of the module, which is that on PyPI.
        what: what needs it, for the message.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        found = importlib.util.find_spec(name) is not None
    except ImportError:
        found = False
    if not found:
        raise MissingPackageError(what, name)
