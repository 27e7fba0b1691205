"""A stand-in for `shaper serve`: streams tokens, and writes what the emulated GPU would.

Run as a script it takes the flags that the benchmark passes, writes a power
trace and a decision log where the environment says so, and ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from shaper.emulator.trace import PowerTraceWriter

MODEL = "fake-model"


class FakeServer:
    """Answers `/health`, `/v1/models` and streaming `/v1/completions`.

    `fault` is what goes wrong with every completion: `http_500`, `error_event`,
    `cut` (the stream ends before its end mark), `endless` (more tokens than
    asked for), `hang` (nothing after the first token), `split` (odd chunk borders, and
    `\\r\\n`) or `several` (two tokens a chunk).
    """

    def __init__(self, token_seconds: float = 0.001, fault: str = "") -> None:
        self.token_seconds = token_seconds
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []
        self.arrivals: list[float] = []
        self.app = web.Application(client_max_size=64 * 1024 * 1024)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/metrics", self._health)
        self.app.router.add_get("/v1/models", self._models)
        self.app.router.add_post("/v1/completions", self._completions)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self.arrivals.append(time.monotonic())
        body = await request.json()
        self.bodies.append(body)
        if self.fault == "http_500":
            return web.json_response({"error": {"message": "out of order"}}, status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for data in self._events(body):
            if self.fault == "split":
                data = data.replace(b"\n", b"\r\n")
                for half in (data[:17], data[17:-3], data[-3:]):
                    await response.write(half)
                    await asyncio.sleep(0)
            else:
                await response.write(data)
            await asyncio.sleep(3600.0 if self.fault == "hang" else self.token_seconds)
        return response

    def _events(self, body: dict[str, Any]) -> Iterator[bytes]:
        count: int = body["max_tokens"]
        if self.fault == "error_event":
            yield _event({"error": {"message": "the engine is gone", "code": 500}})
            return
        per_chunk = 2 if self.fault == "several" else 1
        sent = count + 5 if self.fault == "endless" else count
        for _ in range(0, sent, per_chunk):
            yield _event({"id": "x", "choices": [{"index": 0, "text": "a" * per_chunk}]})
        if self.fault == "cut":
            return
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        yield _event({"id": "x", "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


@contextlib.contextmanager
def serving(server: FakeServer) -> Iterator[str]:
    """Runs the server in a thread of this process; yields its URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.app, handler_cancellation=True, shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    port = runner.addresses[0][1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _flag(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


PERIOD_SECONDS = 0.2
BURST_SECONDS = 0.04
IDLE_WATTS = 400.0


def _segments(burst_watts: float, start: float, end: float) -> list[list[float]]:
    """Power from start to end: a burst at the head of every period."""
    rows = []
    while start < end:
        period = start // PERIOD_SECONDS * PERIOD_SECONDS
        in_burst = start < period + BURST_SECONDS
        until = min(end, period + (BURST_SECONDS if in_burst else PERIOD_SECONDS))
        # Rounding may put an edge at the start itself.
        until = max(until, start + 1e-6)
        rows.append([start, until, burst_watts if in_burst else IDLE_WATTS])
        start = until
    return rows


async def _write_traces(arguments: list[str]) -> None:
    prefix = os.environ.get("SHAPER_EMULATE_TRACE")
    log = os.environ.get("SHAPER_DECISION_LOG")
    writer = PowerTraceWriter(f"{prefix}.rank0") if prefix else None
    # A limit is kept by cutting the bursts off.
    limited = {"--power-limit", "--power-group"} & set(arguments)
    watts = 500.0 if limited else 700.0
    before = time.monotonic()
    while True:
        await asyncio.sleep(0.01)
        now = time.monotonic()
        rows = _segments(watts, before, now)
        if writer is not None and rows:
            writer.append(np.array(rows))
            now = rows[-1][1]
        if log:
            line = {"t": now, "reason": "chunk_power", "decodes": 3, "prefill_tokens": 512}
            line |= {"limit_prefill_tokens": 512, "predicted_watts": watts, "meter_watts": watts}
            with Path(log).open("a") as file:
                file.write(json.dumps(line) + "\n")
        before = now


def main(arguments: list[str]) -> None:
    """Serves until SIGTERM; with the word `crash` it ends at once with code 3."""
    print("fake server", os.getpid(), "starting:", " ".join(arguments), flush=True)
    if "crash" in arguments:
        print("no luck today", flush=True)
        sys.exit(3)
    app = FakeServer().app

    async def background(_: web.Application) -> Any:
        task = asyncio.create_task(_write_traces(arguments))
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app.cleanup_ctx.append(background)
    port = int(_flag(arguments, "--port") or 0)
    web.run_app(app, host="127.0.0.1", port=port, print=lambda _: None)


if __name__ == "__main__":
    main(sys.argv[1:])
