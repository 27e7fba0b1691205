"""Starting and stopping a server process, with a fake one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.harness.machine import group_members
from bench.harness.servers import (
    Server,
    ServerCommand,
    ServerError,
    clean_environment,
    free_port,
    tail,
)
from tests.bench import fake_server


def command(folder: Path, *arguments: str) -> ServerCommand:
    port = free_port()
    return ServerCommand(
        "test",
        (sys.executable, str(fake_server.__file__), "--port", str(port), *arguments),
        clean_environment({"PYTHONPATH": str(Path(__file__).parents[2])}),
        folder / "server.log",
        port,
    )


def test_start_and_stop(tmp_path: Path) -> None:
    """It answers, names its model, and leaves no process behind."""
    with Server(command(tmp_path)) as server:
        assert server.wait_until_ready(60.0) > 0.0
        assert server.served_model() == fake_server.MODEL
        group = server.process_group
        assert group in group_members(group)
    assert group_members(group) == []


def test_an_exception_stops_it_too(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a run leaves no process behind."""
    with pytest.raises(KeyboardInterrupt), Server(command(tmp_path)) as server:  # noqa: PT012
        server.wait_until_ready(60.0)
        group = server.process_group
        raise KeyboardInterrupt
    assert group_members(group) == []


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    """The message has the exit code, the log's path and its last lines."""
    with Server(command(tmp_path, "crash")) as server, pytest.raises(ServerError) as caught:
        server.wait_until_ready(60.0)
    message = str(caught.value)
    assert "exit code 3" in message
    assert str(tmp_path / "server.log") in message
    assert "no luck today" in message


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    """A start that takes too long ends with an error, and the process with it."""
    sleeper = ServerCommand(
        "slow",
        (sys.executable, "-c", "import time; time.sleep(600)"),
        clean_environment({}),
        tmp_path / "log",
        free_port(),
    )
    with (
        Server(sleeper) as server,
        pytest.raises(ServerError, match="did not answer within 1 s"),
    ):
        server.wait_until_ready(1.0)


def test_a_server_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left after the grace time is killed, children included."""
    monkeypatch.setattr("bench.harness.servers.STOP_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr("bench.harness.servers._LEFTOVER_TIMEOUT_SECONDS", 0.2)
    script = (
        "import signal, subprocess, sys, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print('up', flush=True); time.sleep(600)"
    )
    stubborn = ServerCommand(
        "stubborn",
        (sys.executable, "-c", script),
        clean_environment({}),
        tmp_path / "log",
        free_port(),
    )
    server = Server(stubborn).__enter__()
    group = server.process_group
    while b"up" not in (tmp_path / "log").read_bytes():
        pass
    server.stop()
    server.stop()
    assert group_members(group) == []


def test_environment_is_cleaned_of_shaper_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own SHAPER_ variables don't reach the servers; what is added does."""
    monkeypatch.setenv("SHAPER_LIMITS", "100W@1s")
    monkeypatch.setenv("_SHAPER_STATUS", "x")
    environment = clean_environment({"SHAPER_DECISION_LOG": "log"})
    shaper = {name for name in environment if "SHAPER" in name}
    assert shaper == {"SHAPER_DECISION_LOG"}


def test_tail_shows_the_end(tmp_path: Path) -> None:
    """Only the last lines of a long log are shown; a missing one says so."""
    path = tmp_path / "log"
    path.write_text("\n".join(f"line {i}" for i in range(5000)))
    assert "line 4999" in tail(path)
    assert "line 4000" not in tail(path)
    assert "can't be read" in tail(tmp_path / "none")
