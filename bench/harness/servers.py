"""Starts, watches and stops the server under test as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.harness.machine import group_members
from shaper.errors import ShaperError

HOST = "127.0.0.1"
START_TIMEOUT_SECONDS = 240.0
STOP_TIMEOUT_SECONDS = 20.0
_LEFTOVER_TIMEOUT_SECONDS = 5.0
_POLL_SECONDS = 0.25
_TAIL_LINES = 15
_TAIL_BYTES = 16_384
# Whatever proxy the environment names, the server is on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(ShaperError):
    """The server did not start, or ended by itself. The message has its log's end."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """What to start, and where its output goes."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path
    port: int

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"


def shaper_serve(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command line of `shaper serve` in this interpreter's environment."""
    return (sys.executable, "-m", "shaper.cli.main", "serve", *arguments)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def clean_environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without any shaper setting, plus `added`.

    A variable that a user has set for another server must not shape the baseline.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SHAPER_", "_SHAPER_"))
    }
    # No server of the benchmark has any business on the network.
    offline = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return kept | offline | dict(added)


class Server:
    """A server process, stopped when the `with` block ends, however it ends."""

    def __init__(self, command: ServerCommand) -> None:
        """Nothing starts before the `with` block is entered."""
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = self.command
        command.log_path.parent.mkdir(parents=True, exist_ok=True)
        with command.log_path.open("wb") as log:
            # A session of its own: Ctrl-C reaches the benchmark only, which then stops
            # the server in order, and the whole group can be ended by its id.
            self._process = subprocess.Popen(
                command.arguments,
                env=dict(command.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def process_group(self) -> int:
        """Id of the group of all its processes.

        Raises:
            ServerError: it was never started.
        """
        if self._process is None:
            raise ServerError(f"the {self.command.name} server was not started")
        return self._process.pid

    def wait_until_ready(
        self,
        timeout_seconds: float = START_TIMEOUT_SECONDS,
        waiting: Callable[[float], None] | None = None,
    ) -> float:
        """Return once `/health` answers.

        Args:
            timeout_seconds: how long to wait.
            waiting: called with the seconds waited so far, a few times a second.

        Returns:
            Seconds that the start took.

        Raises:
            ServerError: it ended or did not answer in time.
        """
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < timeout_seconds:
            self.check_alive()
            if _healthy(self.command.url):
                return waited
            if waiting is not None:
                waiting(waited)
            time.sleep(_POLL_SECONDS)
        raise ServerError(self._message(f"did not answer within {timeout_seconds:.0f} s"))

    def check_alive(self) -> None:
        """Raises ServerError if the server has ended."""
        if self._process is None:
            raise ServerError(f"the {self.command.name} server was not started")
        code = self._process.poll()
        if code is not None:
            raise ServerError(self._message(f"ended with exit code {code}"))

    def served_model(self) -> str:
        """The model's name on the server's routes.

        Raises:
            ServerError: `/v1/models` does not answer with one.
        """
        try:
            with _OPENER.open(f"{self.command.url}/v1/models", timeout=10) as response:
                return str(json.load(response)["data"][0]["id"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise ServerError(self._message(f"offers no model: {error}")) from error

    def metrics(self) -> str:
        """What `/metrics` says now.

        Raises:
            ServerError: it does not answer.
        """
        try:
            with _OPENER.open(f"{self.command.url}/metrics", timeout=10) as response:
                return str(response.read().decode())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(self._message(f"shows no metrics: {error}")) from error

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whatever is left of the group. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_SECONDS)
        deadline = time.monotonic() + _LEFTOVER_TIMEOUT_SECONDS
        while group_members(process.pid) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 5)
        if process.poll() is None or group_members(process.pid):
            _kill_group(process.pid)
        process.wait()

    def _message(self, what: str) -> str:
        path = self.command.log_path
        return f"the {self.command.name} server {what}; the end of its log {path}:\n{tail(path)}"


def tail(path: Path) -> str:
    """The last lines of a log, indented."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"    (can't be read: {error.strerror})"
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:]) or "    (empty)"


def _healthy(url: str) -> bool:
    try:
        with _OPENER.open(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _kill_group(process_group: int) -> None:
    try:
        os.killpg(process_group, signal.SIGKILL)
    except ProcessLookupError:
        return
