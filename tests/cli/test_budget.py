"""The commands for a running server: what they send, and what they say of what comes back."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.cli import main
from shaper.server.requests import BudgetRequest


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail; returns its one line."""
    assert main.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def answering() -> Iterator[Any]:
    """A server that answers every request with what the test has put into `answers`."""
    answers: list[tuple[int, dict[str, str], bytes]] = []
    seen: list[tuple[str, str, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.command, self.path, dict(self.headers), body))
            status, headers, text = answers[-1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_DELETE = answer  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{server.server_port}", answers=answers, seen=seen
        )
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "headers", "text", "says"),
    [
        (401, {}, b'{"error": {"code": "invalid_admin_key"}}', "refuses the key"),
        (401, {}, b'{"error": "Unauthorized"}', "no control routes"),
        (404, {}, b'{"detail": "Not Found"}', "no control routes"),
        (409, {}, b'{"error": {"message": "too low\\n", "code": "infeasible"}}', "says: too low"),
        (500, {}, b"<html>", "answers with 500"),
        (200, {}, b"<html>", "not as this server would"),
        (200, {}, b"{}", "not as this server would"),
        (307, {"Location": "http://192.0.2.1/"}, b"", "answers with 307"),
    ],
)
def test_what_a_server_may_say_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answering: Any,
    status: int,
    headers: dict[str, str],
    text: bytes,
    says: str,
) -> None:
    """Whoever listens there; the key follows no redirect, and goes through no proxy."""
    monkeypatch.setenv("SHAPER_ADMIN_KEY", "a-key-of-this-test")
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")
    answering.answers.append((status, headers, text))
    assert says in refused(capsys, "budget", "show", "--url", f"{answering.url}/v1/")
    assert len(answering.seen) == 1


def test_a_budget_is_asked_for_as_it_was_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answering: Any
) -> None:
    """The command adds who asks, and the key stands in the header alone."""
    monkeypatch.setenv("SHAPER_ADMIN_KEY", "a-key-of-this-test")
    answering.answers.append((200, {}, b'{"engines": [], "asked": {"sequence": 0}}'))
    line = [
        "budget",
        "set",
        "500W@1s",
        "600W@100ms",
        "--gpu-limit",
        "none",
        "--ramp",
        "200W/s",
        "--for",
        "10min",
    ]
    line += ["--fallback", "550W@1s", "--why", "rack 4", "--url", answering.url]
    assert main.main(line) == 0
    assert capsys.readouterr().out == "no change in force\n"
    method, path, headers, body = answering.seen[0]
    assert (method, path) == ("PUT", "/v1/shaper/budget")
    assert headers["Authorization"] == "Bearer a-key-of-this-test"
    asked = json.loads(body)
    assert asked.pop("who").endswith(socket.gethostname())
    assert asked == {
        "why": "rack 4",
        "limits": ["500W@1s", "600W@100ms"],
        "gpu_limits": [],
        "ramp_watts_per_second": "200W/s",
        "for": "10min",
        "fallback": {"limits": ["550W@1s"]},
    }
    BudgetRequest.model_validate(json.loads(body))


def test_what_the_server_warns_of_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answering: Any
) -> None:
    """Beside what holds, since it does."""
    monkeypatch.setenv("SHAPER_ADMIN_KEY", "a-key-of-this-test")
    answering.answers.append((200, {}, b'{"engines": [], "asked": {}, "warnings": ["too high"]}'))
    assert main.main(["budget", "set", "900W@1s", "--url", answering.url]) == 0
    printed = capsys.readouterr()
    assert printed.out == "no change in force\n"
    assert printed.err == "shaper: warning: too high\n"
