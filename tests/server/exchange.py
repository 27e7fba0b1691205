"""One request through the admission middleware, with vLLM's place taken by a fake."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from shaper.core.supervise.status import AdmissionState
from shaper.server.admission import AdmissionGate, AdmissionMiddleware, GateReader
from shaper.server.request_class import KeyClasses

OPEN, SHAPED = AdmissionState.OPEN, AdmissionState.SHAPED
DEFER, SHED = AdmissionState.DEFER, AdmissionState.SHED
MARK = {"shaper_class": "flex"}
ROUTE = "/v1/chat/completions"


class Fixed(GateReader):
    """A gate that the test sets."""

    def __init__(self, gate: AdmissionGate | None) -> None:
        super().__init__(list)
        self.fixed = gate

    def gate(self) -> AdmissionGate | None:
        return self.fixed


class Inside:
    """vLLM's place: reads the body, remembers it and answers 200."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any]] = []
        self.body = b""
        self.headers: dict[bytes, bytes] = {}
        self.messages: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls.append((scope, receive, send))
        self.headers = dict(scope["headers"])
        while True:
            message = await receive()
            self.messages.append(message)
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"ok"})


class Exchange:
    """One request through the middleware."""

    def __init__(
        self,
        body: bytes | dict[str, Any] = b"{}",
        *,
        state: AdmissionState | None = OPEN,
        recovery: float | None = 20.0,
        headers: dict[str, str] | None = None,
        path: str = ROUTE,
        method: str = "POST",
        keys: dict[str, Any] | None = None,
        chunk: int = 0,
        length: bool = True,
        cut: bool = False,
        type_: str = "http",
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        parts = [raw[at : at + chunk] for at in range(0, len(raw), chunk)] if chunk else [raw]
        self.sent_in: list[dict[str, Any]] = [
            {"type": "http.request", "body": part, "more_body": cut or index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        self.sent_in.append({"type": "http.disconnect"})
        self.inside = Inside()
        given = {name.lower().encode(): value.encode() for name, value in (headers or {}).items()}
        if length:
            given[b"content-length"] = str(len(raw)).encode()
        self.scope = {"type": type_, "path": path, "method": method, "headers": list(given.items())}
        self.received = 0
        self.out: list[Any] = []
        gate = None if state is None else AdmissionGate(state, recovery)
        self.app = AdmissionMiddleware(self.inside, gates=Fixed(gate), keys=KeyClasses(keys or {}))

    def go(self) -> Exchange:
        asyncio.run(self.app(self.scope, self.receive, self.send))
        return self

    async def receive(self) -> dict[str, Any]:
        message = self.sent_in[min(self.received, len(self.sent_in) - 1)]
        self.received += 1
        return message

    async def send(self, message: Any) -> None:
        self.out.append(message)

    @property
    def status(self) -> int:
        return int(self.out[0]["status"])

    @property
    def answer_headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.out[0]["headers"]}

    @property
    def answer(self) -> Any:
        return json.loads(self.out[1]["body"])

    @property
    def marked(self) -> bool:
        arguments = json.loads(self.inside.body).get("vllm_xargs") or {}
        return bool(arguments.get("shaper_class") == "flex")
