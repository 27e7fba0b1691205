"""What `shaper serve` can check before it starts vLLM, each in one line to the user."""

from __future__ import annotations

import argparse
import errno
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from shaper.config.model import ShaperConfig
from shaper.emulator.shapes import known_models, load_model_config
from shaper.engine.compat import vllm_version
from shaper.errors import ConfigError, EngineError, UnknownModelError
from shaper.files.outputs import check_directory, check_output, check_package

DEFAULT_PORT = 8000

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?(:[\w.\-]+)?")


def check_vllm_imports() -> None:
    """vLLM is installed and can be imported, for those that run its parts in this process.

    Raises:
        EngineError: it is not, or something that it needs is missing.
    """
    vllm_version()
    try:
        import vllm  # noqa: F401 - fails here, before anything is built
    except ImportError as error:
        raise EngineError(
            f"vLLM can't be imported by {sys.executable} ({error}): run `make setup` in a clone of "
            "this project, or install it anew"
        ) from error


def check_files(config: ShaperConfig) -> None:
    """What a server is to write can be written: it would find out after the model is loaded.

    Raises:
        ConfigError: a directory is not there, or this user may not write in it.
        MissingPackageError: a package for it is not there.
    """
    if config.record is not None:
        path = Path(config.record)
        check_output(path, "--record", ".csv", ".parquet")
        if path.suffix == ".parquet":
            check_package("pyarrow", f"--record {path} (a .csv needs nothing):")
    if config.decision_log is not None:
        check_output(Path(config.decision_log), "decision_log")
    if config.record_directory is not None:
        check_directory(Path(config.record_directory), "record_directory")


def early_address(arguments: Sequence[str]) -> tuple[str | None, int | None]:
    """Host and port from an unparsed command line.

    The port is None where only vLLM's parser can tell (a `--config` file, a
    Unix socket), and vLLM's default where nothing is given.

    Raises:
        ConfigError: the port is no port.
    """
    host = _flag_value(arguments, "--host")
    text = _flag_value(arguments, "--port")
    if text is None:
        elsewhere = any(_flag_value(arguments, flag) for flag in ("--config", "--uds"))
        return host, None if elsewhere else DEFAULT_PORT
    try:
        port = int(text)
    except ValueError:
        raise ConfigError(f"--port {text!r} is not a number") from None
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} is not between 0 and 65535")
    return host, port


def _flag_value(arguments: Sequence[str], flag: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def check_port(host: str | None, port: int | None) -> None:
    """The address is free. A port of None is not checked.

    Raises:
        ConfigError: the address can't be listened on.
    """
    if port is None:
        return
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} is in use: give another one with --port, "
                    "or end what listens there"
                ) from error
            raise ConfigError(
                f"can't listen on {host or 'any address'}, port {port}: {error.strerror}; "
                "give another --host or --port"
            ) from error


def engine_count(arguments: argparse.Namespace) -> int:
    """Data-parallel ranks on this host, by vLLM's parsed arguments."""
    local = getattr(arguments, "data_parallel_size_local", None)
    return int(arguments.data_parallel_size if local is None else local)


def check_model(model: str, *, emulated: bool) -> None:
    """Refuses what is certainly no model; a hub id is left for vLLM to look up.

    Raises:
        UnknownModelError: there is no such model; the message lists the built-in shapes.
    """
    if emulated:
        load_model_config(model)
        return
    if Path(model).expanduser().exists() or "://" in model:
        return
    if model in known_models():
        raise UnknownModelError(
            f"{model!r} is a built-in shape without weights: add --emulate GPU to serve it, "
            "or name a model that has weights"
        )
    if not _HUB_ID.fullmatch(model):
        raise UnknownModelError(
            f"no model {model!r}: there is no such directory, and it is no Hugging Face id; "
            f"with --emulate, built-in shapes are {', '.join(known_models())}"
        )
