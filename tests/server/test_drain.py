"""A stop, as clients see it: with vLLM's server taken by a fake, and its engine's client."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.server.drain import DrainMiddleware

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Engine:
    """vLLM's engine client, as far as a stop goes."""

    def __init__(self) -> None:
        self.errored = False
        self.stopped_with: list[Any] = []

    def shutdown(self, timeout: float | None = None) -> None:
        self.stopped_with.append(timeout)
        self.errored = True


class Server:
    """An app whose requests wait until they are let go, behind the layer."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.go_on = asyncio.Event()
        self.layer = DrainMiddleware(self.app)
        self.sent: list[list[Any]] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["stream"]:
            await send({"type": "http.response.start", "status": 200, "headers": scope["stream"]})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await self.go_on.wait()
        if not scope["stream"]:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    async def begin(self) -> None:
        app = SimpleNamespace(state=SimpleNamespace(engine_client=self.engine))
        await self.layer({"type": "lifespan", "app": app}, None, None)  # type: ignore[arg-type]

    def ask(self, stream: Any = (), method: str = "POST", path: str = "/v1/completions") -> Any:
        sent: list[Any] = []
        self.sent.append(sent)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "stream": list(stream)}
        return asyncio.ensure_future(self.layer(scope, None, send))  # type: ignore[arg-type]

    async def stop(self, timeout: float | None) -> Any:
        """As vLLM does at a signal."""
        call = lambda: self.engine.shutdown(timeout=timeout)  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(None, call)


def run(scene: Any) -> None:
    async def body() -> None:
        server = Server()
        await server.begin()
        await scene(server)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run(body())


def test_what_is_in_flight_is_finished_before_the_engine_stops():
    """And the engine has what is left of the time."""

    async def scene(server: Server) -> None:
        request = server.ask()
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(server.stop(30.0))
        while not server.layer.stopping:
            await asyncio.sleep(0.01)
        assert server.engine.stopped_with == []
        server.go_on.set()
        await request
        await stop
        assert server.sent[0][-1]["body"] == b"end"
        assert 20.0 < server.engine.stopped_with[0] <= 30.0

    run(scene)


@pytest.mark.parametrize("timeout", [1.0, 0.0, None])
def test_what_is_not_finished_is_told(timeout: float | None):
    """A stream has an error and no end, an answer that has not begun a 503: no client waits."""

    async def scene(server: Server) -> None:
        requests = [server.ask(SSE), server.ask(), server.ask([(b"content-type", b"audio/wav")])]
        await asyncio.sleep(0)
        await server.stop(timeout)
        await asyncio.gather(*requests)
        stream, plain, other = server.sent
        assert stream[-1]["more_body"]
        assert json.loads(stream[-1]["body"].removeprefix(b"data: "))["error"]["code"]
        assert plain[0]["status"] == 503
        assert len(other) == 2  # what was sent before; the server closes the connection
        assert len(server.engine.stopped_with) == 1

    run(scene)


def test_work_that_comes_during_a_stop_is_refused():
    """So is the question whether the server is well; metrics and changes are answered."""

    async def scene(server: Server) -> None:
        first = server.ask()
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(server.stop(30.0))
        while not server.layer.stopping:
            await asyncio.sleep(0.01)
        for late in (server.ask(), server.ask(method="GET", path="/health")):
            await late
        assert [sent[0]["status"] for sent in server.sent[1:]] == [503, 503]
        metrics = server.ask(method="GET", path="/metrics")
        server.go_on.set()
        await asyncio.gather(first, metrics, stop)
        assert server.sent[3][0]["status"] == 200

    run(scene)


def test_an_engine_that_dies_leaves_no_request_behind(monkeypatch):
    """vLLM forgets some of them; a drain of a dead engine waits for nothing."""
    monkeypatch.setattr("shaper.server.drain._WATCH_SECONDS", 0.01)
    monkeypatch.setattr("shaper.server.drain._DEAD_SECONDS", 0.01)

    async def scene(server: Server) -> None:
        request = server.ask()
        await asyncio.sleep(0)
        server.engine.errored = True
        await asyncio.wait_for(request, 30)
        assert server.sent[0][0]["status"] == 503
        await asyncio.wait_for(server.stop(600.0), 30)

    run(scene)


def test_a_stop_on_the_event_loop_waits_for_nothing():
    """Some versions of vLLM stop there: waiting would hold up what is waited for."""

    async def scene(server: Server) -> None:
        request = server.ask(SSE)
        await asyncio.sleep(0)
        server.engine.shutdown(timeout=600.0)
        await asyncio.wait_for(request, 30)
        assert b"error" in server.sent[0][-1]["body"]

    run(scene)


def test_a_client_that_hangs_up_is_cancelled_as_ever():
    """The layer keeps a cancellation that is not its own."""

    async def scene(server: Server) -> None:
        request = server.ask()
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    run(scene)


def test_a_server_without_an_engine_passes_all():
    """vLLM has some that only render prompts."""

    async def scene(server: Server) -> None:
        server.go_on.set()
        app = SimpleNamespace(state=SimpleNamespace(engine_client=None))
        layer = DrainMiddleware(server.app)
        await layer({"type": "lifespan", "app": app}, None, None)  # type: ignore[arg-type]
        await server.ask()
        assert server.sent[0][-1]["body"] == b"end"

    run(scene)
