"""A stop of the server: every client gets its whole answer, or an error in its place.

A layer around vLLM's API server, made in each of its processes. vLLM stops its engine first,
and then waits without end for connections whose streams have no engine any more. Here

    the engine's client is asked to stop   work that comes now gets 503; the stop waits until
                                           what is in flight has ended, within its time
    the time is over                       what is left gets an error, and its connection ends;
                                           vLLM aborts it, and the engine stops in order
    the engine is gone                     the same, for what vLLM itself has not ended

The stop is found by wrapping `shutdown` of the engine's client, which vLLM calls from a
thread of its own at a signal (`--shutdown-timeout` is its argument). Versions that call it
on the event loop can't be made to wait: there the requests are ended at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from shaper.ipc.logs import share_log_handlers
from shaper.ipc.orphan import watch_parent
from shaper.server.asgi import App, Message, Receive, Scope, Send, openai_error, send_json

logger = logging.getLogger(__name__)

# Of a drain's time: for the engine to end in order before vLLM's own deadline kills it.
_END_SECONDS = 2.0
# vLLM's own way to end the requests of a dead engine takes one turn of its event loop.
_DEAD_SECONDS = 2.0
_POLL_SECONDS = 0.05
_WATCH_SECONDS = 1.0
_MESSAGE = "the server is shutting down: send the request again, here later or elsewhere"
_CUT = "the server was shut down before this answer was finished"


class _Request:
    """One request in flight."""

    __slots__ = ("ended", "events", "started", "task")

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self.task = task
        self.started = False
        self.events = False
        """Its answer is a stream of server-sent events."""
        self.ended = False


class DrainMiddleware:
    """ASGI middleware; vLLM makes one in every API server.

    Args:
        app: what is inside.
        clock: monotonic seconds.
    """

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._requests: set[_Request] = set()
        self._engine: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task[None] | None = None
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse new work during a stop, and watch all other requests to their end."""
        kind = scope["type"]
        if kind == "lifespan":
            self._attach(scope)
        if kind not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif self.stopping and _is_work(scope):
            await _end(kind, send, _MESSAGE)
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Request(asyncio.current_task())

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.started = True
                request.events = any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message.get("headers", ())
                )
            await send(message)

        self._requests.add(request)
        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if not request.ended:
                raise
            if request.task is not None:
                request.task.uncancel()
        finally:
            self._requests.discard(request)
        if request.ended:
            await _end(scope["type"], send, _CUT, request)

    def _attach(self, scope: Scope) -> None:
        """Find the engine's client, and be asked when it is to stop."""
        state = getattr(scope.get("app"), "state", None)
        engine = getattr(state, "engine_client", None)
        if engine is None or self._engine is not None:
            return
        share_log_handlers()
        watch_parent()
        self._engine, self._loop = engine, asyncio.get_running_loop()
        original = engine.shutdown

        def shutdown(*args: Any, **named: Any) -> Any:
            timeout = named.get("timeout", args[0] if args else None)
            try:
                left = self._stop(timeout)
            except Exception:
                # The stop itself must not fail because of this layer.
                logger.exception("requests in flight were not waited for")
                left = timeout
            return original(*args, **named) if left is None else original(timeout=left)

        engine.shutdown = shutdown
        self._watch = self._loop.create_task(self._watch_engine())

    def _stop(self, timeout_seconds: float | None) -> float | None:
        """Wait for what is in flight, and end what is left.

        Returns:
            What of the time is left for the engine.
        """
        first, self.stopping = not self.stopping, True
        if not first or timeout_seconds is None:
            self._end_all_soon()
            return timeout_seconds
        begin = self._clock()
        end = begin + max(timeout_seconds - _END_SECONDS, timeout_seconds / 2)
        if self._on_loop():
            end = -math.inf
        while self._requests and self._clock() < end and not self._engine.errored:
            time.sleep(_POLL_SECONDS)
        if self._requests:
            logger.warning(
                "the stop's time (--shutdown-timeout %g s) is over for %d request(s), which end "
                "with an error: give more time, or stop sending before the stop",
                *(timeout_seconds, len(self._requests)),
            )
        self._end_all_soon()
        while self._requests and self._clock() < end + _END_SECONDS / 2 and not self._on_loop():
            time.sleep(_POLL_SECONDS)
        return max(0.0, timeout_seconds - (self._clock() - begin))

    def _on_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _end_all_soon(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_all)

    def _end_all(self) -> None:
        for request in list(self._requests):
            if request.task is not None and not request.ended:
                request.ended = True
                request.task.cancel()

    async def _watch_engine(self) -> None:
        """Requests of an engine that died are vLLM's to end; those that it forgets are ours."""
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        await asyncio.sleep(_DEAD_SECONDS)
        if not self.stopping:
            self.stopping = True
            self._end_all()


def _is_work(scope: Scope) -> bool:
    """What a server that stops takes no more: requests to the model, and questions whether it
    takes any. Its metrics and the control routes answer to the end."""
    if scope["type"] == "websocket":
        return True
    return scope.get("method") == "POST" or scope.get("path") in ("/health", "/ping")


async def _end(kind: str, send: Send, message: str, request: _Request | None = None) -> None:
    """Tell a client that its request is not served, or not to its end."""
    error = openai_error(message, "service_unavailable", "shutting_down")
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1012, "reason": message})
    elif request is None or not request.started:
        await send_json(send, 503, error)
    elif request.events:
        # As vLLM tells a stream of an error; and then the answer stays incomplete, so that
        # the connection ends in a way that no client takes for a finished one.
        body = b"data: " + json.dumps(error).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})
