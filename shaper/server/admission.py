"""Admission at the API server: flex requests are marked for the engine, or refused with 429.

A layer around vLLM's API server, made in each of its processes. It reads the admission state of
the run's engines from their status blocks, a few times a second at most:

    no engine shapes a budget   every request passes untouched
    open, shaped, defer         a flex request is marked (`request_class.py`) and passes
    shed                        a flex request gets 429 and when to come back

With several engines the most open one counts: vLLM's router may choose it. A block that is
missing or silent says nothing, and nothing is refused for it. Interactive requests always
pass. No error here reaches a request: it then goes on as it came.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shaper.core.supervise.status import AdmissionState
from shaper.ipc.enforcement import enforcement_of
from shaper.ipc.engine_record import Status, read_statuses
from shaper.ipc.flex import FLEX, STALE_SECONDS
from shaper.ipc.refused_requests import POWER, THERMAL, UNKNOWN_CLASS, RefusalCounts
from shaper.ipc.status_block import run_id
from shaper.server.asgi import (
    App,
    Header,
    LogLimit,
    Message,
    Receive,
    Scope,
    Send,
    openai_error,
    route_path,
    send_json,
    server_config,
)
from shaper.server.request_class import KeyClasses, UnknownClassError, classify

logger = logging.getLogger(__name__)

ROUTES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
"""Where work enters that can be marked."""
STATE_HEADER = b"x-shaper-state"
# A prompt of two million tokens. Longer bodies pass unread, by their key's class alone.
MAX_BODY_BYTES = 8 * 1024 * 1024
# The OpenAI client does not retry when it is told to wait longer.
MAX_RETRY_SECONDS = 120
# Clients that were refused together must not come back together.
_JITTER_RATIO = 0.2
# The blocks change every 20 ms, the state some times a second at most.
_READ_AGAIN_SECONDS = 0.05
_STATES = tuple(AdmissionState)

Refusal = tuple[int, dict[str, Any], Sequence[Header]]
"""Status, body and headers of the answer."""


@dataclass(frozen=True, slots=True)
class AdmissionGate:
    """What the most open engine of a run admits."""

    state: AdmissionState
    recovery_seconds: float | None
    thermal: bool = False
    """A limit against overheating holds."""


def most_open(statuses: Sequence[Status], now_seconds: float) -> AdmissionGate | None:
    """What the engines of a run admit; None where none of them shapes a budget.

    An engine that is silent, off, in shadow or without a budget admits everything.
    """
    gates = [_gate(status, now_seconds) for status in statuses]
    if all(gate is None for gate in gates):
        return None
    return min(
        (gate or AdmissionGate(AdmissionState.OPEN, None) for gate in gates),
        key=lambda gate: (_STATES.index(gate.state), gate.recovery_seconds or 0.0),
    )


def _gate(status: Status, now_seconds: float) -> AdmissionGate | None:
    at_seconds, standing = status.record.at_seconds, status.record.standing
    if at_seconds is None or standing is None:
        return None
    enforcement = enforcement_of(status)
    silent = now_seconds - at_seconds > STALE_SECONDS
    if silent or not enforcement.shapes:
        return None
    admits, thermal = standing.admissibility, bool(enforcement.constraints.heat_limits)
    return AdmissionGate(admits.state, admits.recovery_seconds, thermal)


class GateReader:
    """Reads the gate now and then. A failure to read opens it.

    Args:
        read: returns the engines' status blocks.
        clock: monotonic seconds, the engines' own.
    """

    def __init__(
        self, read: Callable[[], Sequence[Status]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read, self._clock = read, clock
        self._gate: AdmissionGate | None = None
        self._read_seconds = -math.inf
        self._log = LogLimit()

    def gate(self) -> AdmissionGate | None:
        """As `most_open`, at most `_READ_AGAIN_SECONDS` ago."""
        now = self._clock()
        if now - self._read_seconds >= _READ_AGAIN_SECONDS:
            self._read_seconds = now
            try:
                self._gate = most_open(self._read(), now)
            except Exception:
                self._gate = None
                if self._log.due():
                    logger.exception("the engines' status can't be read; all requests pass")
        return self._gate


class AdmissionMiddleware:
    """ASGI middleware; vLLM makes one in every API server.

    Args:
        app: what is inside.
        gates: says what the engines admit; by default from this run's blocks.
        keys: classes of API keys; by default of this run's configuration.
        counts: of refusals; by default for this run's metrics.
    """

    def __init__(
        self,
        app: App,
        *,
        gates: GateReader | None = None,
        keys: KeyClasses | None = None,
        counts: RefusalCounts | None = None,
    ) -> None:
        self.app = app
        self._gates = gates or GateReader(lambda: read_statuses(run_id()))
        self._keys = keys
        self._counts = counts or RefusalCounts(run_id())
        self._shed = 0
        self._log = LogLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, mark or refuse."""
        enters = scope["type"] == "http" and scope["method"] == "POST"
        gate = self._gates.gate() if enters and route_path(scope) in ROUTES else None
        if gate is None:
            await self.app(scope, receive, send)
            return
        body = _Body(receive)
        refusal = marked = None
        try:
            refusal, marked = await self._judge(scope, body, gate)
        # The boundary: a mistake in here must not cost a request.
        except Exception:
            if self._log.due():
                logger.exception("admission failed for a request; it passes as it came")
        if refusal is not None:
            await send_json(send, *refusal)
            return
        if marked is not None:
            scope = body.replace(scope, marked)
        await self.app(scope, body.receive, _with_state(send, gate.state))

    async def _judge(
        self, scope: Scope, body: _Body, gate: AdmissionGate
    ) -> tuple[Refusal | None, bytes | None]:
        """The refusal, or None for a request that passes; and its body, where it is marked."""
        if self._keys is None:
            config = server_config(scope)
            self._keys = KeyClasses({} if config is None else config.api_key_classes)
        headers = scope["headers"]
        kind = bound = self._keys.of(headers)
        marked = None
        text = await body.read(headers)
        if text is not None:
            try:
                kind, found = classify(text, headers, bound)
            except UnknownClassError as error:
                self._counts.count(UNKNOWN_CLASS)
                wrong = "invalid_request_error"
                return (400, openai_error(str(error), wrong, "unknown_class"), ()), None
            marked = None if found is text else found
        if kind != FLEX or gate.state is not AdmissionState.SHED:
            return None, marked
        self._shed += 1
        if self._log.due():
            logger.warning("flex requests are refused: %d so far by this API server", self._shed)
        refusal = _refusal(gate)
        self._counts.count(THERMAL if gate.thermal else POWER)
        return refusal, None


class _Body:
    """The body of a request, which is read here and by vLLM once more."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._replay: list[Message] = []

    async def read(self, headers: Sequence[Header]) -> bytes | None:
        """The whole body; None where it is too long, packed or cut off."""
        named = dict(headers)
        length = named.get(b"content-length", b"")
        if b"content-encoding" in named or (length.isdigit() and int(length) > MAX_BODY_BYTES):
            return None
        text = bytearray()
        while True:
            message = await self._receive()
            self._replay.append(message)
            text += message.get("body", b"")
            if message["type"] != "http.request" or len(text) > MAX_BODY_BYTES:
                return None
            if not message.get("more_body", False):
                return bytes(text)

    def replace(self, scope: Scope, body: bytes) -> Scope:
        """Let vLLM read this body in place of the client's; the scope that says so."""
        self._replay = [{"type": "http.request", "body": body, "more_body": False}]
        headers = [
            (name, str(len(body)).encode() if name == b"content-length" else value)
            for name, value in scope["headers"]
        ]
        return {**scope, "headers": headers}

    async def receive(self) -> Message:
        """What was read here, then what comes after it."""
        return self._replay.pop(0) if self._replay else await self._receive()


def _refusal(gate: AdmissionGate) -> Refusal:
    jitter = 1.0 + _JITTER_RATIO * (2.0 * secrets.randbelow(1001) / 1000.0 - 1.0)
    wait = min(float(MAX_RETRY_SECONDS), max(1.0, (gate.recovery_seconds or 1.0) * jitter))
    seconds = math.ceil(wait)
    message = (
        "this server is at its power budget and takes no flex work now; "
        f"try again in {seconds} s, or send it without the class flex"
    )
    return (
        429,
        openai_error(message, "rate_limit_error", "resource_unavailable"),
        [
            (b"retry-after", str(seconds).encode()),
            # The OpenAI client reads this one first; whole seconds alone would lose the jitter.
            (b"retry-after-ms", str(round(1000 * wait)).encode()),
            (STATE_HEADER, gate.state.value.encode()),
        ],
    )


def _with_state(send: Send, state: AdmissionState) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (STATE_HEADER, state.value.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return sending
