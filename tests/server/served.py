"""The control routes over engines whose samplers tick beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from shaper.ipc.control_file import ControlFile
from shaper.ipc.engine_record import read_statuses
from shaper.ipc.status_block import StatusWriter
from shaper.server.control_service import ControlService
from shaper.server.routes import ControlRoutes
from tests.controlled import Walls, engine
from tests.scraping import write

KEY = "an-admin-key-of-a-test"


class Served:
    """Routes over engines whose samplers tick in the same loop."""

    def __init__(self, run: str, **options: Any) -> None:
        self.run = run
        self.engines = [engine(run, now_seconds=0.0) for _ in range(options.pop("engines", 2))]
        self.ticking = options.pop("ticking", True)
        self.writers = [
            StatusWriter(run, rank, {"gpu_count": 1, "idle_watts": 115.0})
            for rank in range(len(self.engines))
        ]
        self.said: list[dict[str, Any]] = [{} for _ in self.engines]
        self.write()
        self.seconds = 0.0
        self.wall = Walls()
        self.passed: list[str] = []
        self.service = ControlService(
            ControlFile(run),
            lambda: read_statuses(run),
            options.pop("config", None),
            clock=self.clock,
            wall=self.wall,
        )
        key = options.pop("key", KEY)
        self.routes = ControlRoutes(self.inner, key=key, service=self.service)

    def clock(self) -> float:
        self.seconds += 0.02
        return self.seconds

    def write(self) -> None:
        """What each engine holds, and what is said of it beside that."""
        for control, writer, said in zip(self.engines, self.writers, self.said, strict=True):
            write(writer, control=control.state, **said)

    async def inner(self, scope: Any, receive: Any, send: Any) -> None:
        self.passed.append(scope.get("path", scope["type"]))
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def _tick(self) -> None:
        while True:
            if self.ticking:
                for control in self.engines:
                    control.tick(self.clock())
                self.write()
            await asyncio.sleep(0)

    def ask(self, method: str, path: str, body: Any = None, **scope: Any) -> tuple[int, Any]:
        """Status and answer; `body` is sent as JSON, or as it is when it is bytes."""
        sent: list[Any] = []
        text = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        parts = [text[i : i + 1000] for i in range(0, len(text), 1000)] or [b""]

        async def receive() -> dict[str, Any]:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        async def both() -> None:
            ticks = asyncio.create_task(self._tick())
            await self.routes(
                {
                    "type": "http",
                    "method": method,
                    "path": path,
                    "query_string": b"",
                    "headers": [(b"authorization", f"Bearer {KEY}".encode())],
                    "client": ("192.0.2.7", 1234),
                }
                | scope,
                receive,
                send,
            )
            ticks.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticks

        asyncio.run(both())
        self.headers = dict(sent[0]["headers"])
        return sent[0]["status"], json.loads(sent[1]["body"])

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    def budget(self, body: Any) -> tuple[int, Any]:
        return self.ask("PUT", "/v1/shaper/budget", body)


@pytest.fixture
def served(run) -> Iterator[Served]:
    made = Served(run)
    yield made
    made.close()
