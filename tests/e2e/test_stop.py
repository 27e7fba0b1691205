"""A server that is stopped, at whatever moment: clients get an end, and no process is left."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from shaper.core.types import PowerLimit
from shaper.doctor.blocks import own_blocks
from shaper.group import check_group, cleanup_groups
from shaper.ipc.processes import descendants, lives
from tests.e2e.conftest import (
    MODEL,
    START_SECONDS,
    Server,
    refused_start,
    running_server,
    started_server,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DRAIN_SECONDS = 15
# An answer of so many tokens is over in seconds; the longest context takes minutes.
SHORT, LONG = 5, 60_000


def ask(server: Server, max_tokens: int) -> str:
    """One stream, read to its end: `finished`, or what went wrong."""
    body = {"model": MODEL, "prompt": f"{max_tokens} x", "max_tokens": max_tokens, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps(body | {"ignore_eos": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    lines = []
    try:
        with urllib.request.urlopen(request, timeout=DRAIN_SECONDS + 60) as answer:
            lines += [line.decode() for line in answer]
    except urllib.error.HTTPError as error:
        return str(error.code)
    except TimeoutError:
        return "silence"
    except (OSError, ValueError) as error:
        lines.append(repr(error))
    if any('"error"' in line for line in lines):
        return "error"
    return "finished" if any("[DONE]" in line for line in lines) else "cut"


def tree(server: Server) -> list[int]:
    return [server.process.pid, *descendants(server.process.pid)]


def assert_all_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if lives(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_stop_under_load_ends_every_stream(tmp_path: Path) -> None:
    """Under a limit: what can be finished in the drain's time is, the rest is told, as is
    who comes meanwhile, and the server ends with code 0 within its time."""
    pytest.importorskip("vllm")
    flags = ("--power-limit", "450W@100ms", "--shutdown-timeout", str(DRAIN_SECONDS))
    with running_server(tmp_path, *flags) as server:
        pids = tree(server)
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            long = [pool.submit(ask, server, LONG) for _ in range(20)]
            server.wait_for("load", lambda: server.metric("vllm:num_requests_running") >= 20)
            short = [pool.submit(ask, server, SHORT) for _ in range(8)]
            names = ("num_requests_running", "num_requests_waiting", "request_success_total")
            # All of them: one that is still on its way when the drain begins is refused.
            server.wait_for("load", lambda: sum(server.metric(f"vllm:{n}") for n in names) >= 28)
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            # Whoever comes once the drain has begun is refused.
            server.wait_for("drain", lambda: ask(server, SHORT) == "503", DRAIN_SECONDS)
            assert server.process.wait(DRAIN_SECONDS + 30) == 0, server.tail()
            seconds = time.monotonic() - begin
            ends = [each.result(10) for each in long]
            done = [each.result(10) for each in short]
        assert_all_gone(pids)
    assert done == ["finished"] * len(done)
    assert set(ends) == {"error"}
    assert seconds < DRAIN_SECONDS + 10
    assert "--shutdown-timeout 15 s" in server.log.read_text(errors="replace")


def test_a_stop_in_a_start_ends_every_process(tmp_path: Path) -> None:
    """While the engine is up and the API server is not: vLLM may swallow this one."""
    pytest.importorskip("vllm")
    server = started_server(tmp_path, "--power-limit", "500W@100ms")
    try:
        server.wait_for("start", lambda: "shaper on" in server.log.read_text(), START_SECONDS)
        pids = tree(server)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        assert_all_gone(pids)
        assert time.monotonic() - begin < 25
    finally:
        server.kill()


def test_a_killed_server_leaves_no_engine_and_no_place(tmp_path: Path) -> None:
    """A second server does not fit into the group while the engine of a killed one is stopped,
    and is told whose process to end; once it goes on it ends itself, and its place is free."""
    pytest.importorskip("vllm")
    name = f"e2e-stop-{os.getpid()}"
    group = ("--power-group", name, "--group-limit", "200W@100ms")
    with running_server(tmp_path, *group) as server:
        pids = tree(server)
        [engine] = [block.pid for block in own_blocks() if block.pid in pids]
        os.kill(engine, signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        line = refused_start(tmp_path, *group)
        assert f"process {engine} " in line
        assert "server is gone" in line
        os.kill(engine, signal.SIGCONT)
        assert_all_gone(pids)
        check_group(name, (PowerLimit(200.0, 0.1),), idle_watts=115.0)
        cleanup_groups(time.monotonic(), name)


def test_a_server_whose_engine_is_killed_fails(tmp_path: Path) -> None:
    """Its clients are told, every process ends, and the code is one that restarts a service."""
    pytest.importorskip("vllm")
    with running_server(tmp_path, "--power-limit", "450W@100ms") as server:
        pids = tree(server)
        [engine] = [block.pid for block in own_blocks() if block.pid in pids]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(ask, server, LONG) for _ in range(4)]
            server.wait_for("load", lambda: server.metric("vllm:num_requests_running") == 4)
            os.kill(engine, signal.SIGKILL)
            assert server.process.wait(30) == 1, server.tail()
            assert {each.result(10) for each in streams} <= {"error", "500", "503"}
        assert_all_gone(pids)
