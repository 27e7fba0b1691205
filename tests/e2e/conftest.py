"""The real server, started as a user starts it, on a free port of 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = "llama-3.1-8b"
START_SECONDS = 240
STOP_SECONDS = 60
# Tests in virtual time ask vLLM for less in this process, and a server would inherit that.
LOGGED = {"VLLM_LOGGING_LEVEL": "INFO"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Server:
    """A running `shaper serve`, leader of its own process group."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """Sum over all label sets."""
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in self.metrics().splitlines()
            if line.startswith((f"{name}{{", f"{name} "))
        ]
        assert values, f"/metrics has no {name}"
        return sum(values)

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
            assert self.process.poll() is None, self.tail()
            time.sleep(0.05)

    def wait_until_idle(self) -> None:
        """No request runs or waits and no KV block is held."""
        self.wait_for(
            "idle",
            lambda: (
                self.metric("vllm:num_requests_running") == 0
                and self.metric("vllm:num_requests_waiting") == 0
                and self.metric("vllm:kv_cache_usage_perc") == 0
            ),
        )

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self, how: signal.Signals) -> int:
        """Ends the server as an operator does.

        Returns:
            Its exit code, once no process of its group is left.
        """
        self.process.send_signal(how)
        code = self.process.wait(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while self._group_lives():
            assert time.monotonic() < deadline, "the server left processes behind"
            time.sleep(0.05)
        return code

    def _group_lives(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """Whatever is left, for a test that failed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def started(command: list[str], port: int, directory: Path, environment: dict[str, str]) -> Server:
    """A server on its way up."""
    log = directory / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    return Server(process, port, log)


def started_server(
    directory: Path, *flags: str, environment: dict[str, str] | None = None
) -> Server:
    """`shaper serve llama-3.1-8b --emulate h200-sxm FLAGS`, on its way up."""
    port = free_port()
    command = [sys.executable, "-m", "shaper", "serve", MODEL, "--emulate", "h200-sxm"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    return started(command, port, directory, os.environ | LOGGED | (environment or {}))


def refused_start(directory: Path, *flags: str) -> str:
    """The one line of a server that must not start."""
    command = [sys.executable, "-m", "shaper", "serve", MODEL, "--emulate", "h200-sxm"]
    done = subprocess.run(
        [*command, "--port", "0", *flags],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@contextlib.contextmanager
def ready(server: Server) -> Iterator[Server]:
    """The server, once it answers, until the block ends."""
    try:
        server.wait_for("start", server.ready, START_SECONDS)
        yield server
    finally:
        server.kill()


def running_server(
    directory: Path, *flags: str, environment: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[Server]:
    """`started_server`, ready, until the block ends."""
    return ready(started_server(directory, *flags, environment=environment))


SHAPED = ("--power-limit", "450W@1s", "--power-limit", "550W@100ms")
"""Limits that bind in these tests: prefills draw 650 W and more, batches of decodes 500 W."""


@pytest.fixture(scope="session")
def shaped_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a context of 4,096 tokens, shared by the tests; it ends as a service manager
    ends it, with code 0 and no process left."""
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("server")
    with running_server(directory, "--max-model-len", "4096", *SHAPED) as started:
        yield started
        assert started.stop(signal.SIGTERM) == 0, started.tail()
