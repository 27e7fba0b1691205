"""Admission at the door: flex requests are marked for the engine, or refused with 429.

A layer around vLLM's API server, made in each of its processes. It reads how the run's
engines stand from their status blocks, a few times a second at most:

    no engine shapes a budget   every request passes untouched
    open, shaped, defer         a flex request is marked (`request_class.py`) and passes
    shed                        a flex request gets 429 and when to come back

With several engines the most open one counts: vLLM's router may choose it. A block that is
missing or silent says nothing, and nothing is refused for it. Interactive requests always
pass. Nothing raises from here into a request: it then goes on as it came.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shaper.config.sources import given_settings, load_config
from shaper.core.supervise.status import AdmissionState
from shaper.errors import ConfigError
from shaper.ipc.control_file import EngineControl
from shaper.ipc.enforcement import constraints_of
from shaper.ipc.flex import FLEX, STALE_SECONDS
from shaper.ipc.metric_table import HEARTBEAT_INDEX, STANDING_METRICS
from shaper.ipc.refused_requests import POWER, THERMAL, UNKNOWN_CLASS, RefusalCounts
from shaper.ipc.status_block import Status, read_statuses, run_id
from shaper.server.asgi import (
    App,
    Header,
    Message,
    Receive,
    Scope,
    Send,
    openai_error,
    send_json,
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
_LOG_AGAIN_SECONDS = 60.0
_STATES = tuple(AdmissionState)
_NAMES = [name for name, _ in STANDING_METRICS]
_STATE_INDEX = _NAMES.index("shaper_admission_state")
_RECOVERY_INDEX = _NAMES.index("shaper_recovery_hint_seconds")


@dataclass(frozen=True, slots=True)
class AdmissionGate:
    """How the most open engine of a run stands."""

    state: AdmissionState
    recovery_seconds: float | None
    thermal: bool = False
    """A limit against overheating holds."""


def most_open(statuses: Sequence[Status], now_seconds: float) -> AdmissionGate | None:
    """What the engines of a run admit; None where none of them shapes a budget.

    An engine that is silent, off, in shadow or without a budget admits everything.
    """
    doors = [_door(status, now_seconds) for status in statuses]
    if all(door is None for door in doors):
        return None
    return min(
        (door or AdmissionGate(AdmissionState.OPEN, None) for door in doors),
        key=lambda door: (_STATES.index(door.state), door.recovery_seconds or 0.0),
    )


def _door(status: Status, now_seconds: float) -> AdmissionGate | None:
    sampler, standing = status.values["sampler"], status.values["standing"]
    control = EngineControl.from_values(status.values["control"])
    if len(sampler) <= HEARTBEAT_INDEX or len(standing) <= _RECOVERY_INDEX or control is None:
        return None
    silent = now_seconds - sampler[HEARTBEAT_INDEX] > STALE_SECONDS
    constraints = constraints_of(status)
    if silent or control.mode != "on" or not constraints.budgeted:
        return None
    recovery = standing[_RECOVERY_INDEX]
    state = _STATES[int(standing[_STATE_INDEX])]
    thermal = bool(constraints.heat_limits)
    return AdmissionGate(state, None if math.isnan(recovery) else recovery, thermal)


class AdmissionGates:
    """Reads the blocks now and then. A failure to read is a door that is open.

    Args:
        read: returns the blocks.
        clock: monotonic seconds, the engines' own.
    """

    def __init__(
        self, read: Callable[[], Sequence[Status]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read, self._clock = read, clock
        self._door: AdmissionGate | None = None
        self._read_seconds = self._logged_seconds = -math.inf

    def look(self) -> AdmissionGate | None:
        """As `most_open`, at most `_READ_AGAIN_SECONDS` ago."""
        now = self._clock()
        if now - self._read_seconds >= _READ_AGAIN_SECONDS:
            self._read_seconds = now
            try:
                self._door = most_open(self._read(), now)
            except Exception:
                self._door = None
                if now - self._logged_seconds > _LOG_AGAIN_SECONDS:
                    self._logged_seconds = now
                    logger.exception("the engines' status can't be read; all requests pass")
        return self._door


class AdmissionMiddleware:
    """ASGI middleware; vLLM makes one in every API server.

    Args:
        app: what is inside.
        keeper: says how the engines stand; by default from this run's blocks.
        keys: classes of API keys; by default of this run's configuration.
        counts: of refusals; by default for this run's metrics.
    """

    def __init__(
        self,
        app: App,
        *,
        keeper: AdmissionGates | None = None,
        keys: KeyClasses | None = None,
        counts: RefusalCounts | None = None,
    ) -> None:
        self.app = app
        self._keeper = keeper or AdmissionGates(lambda: read_statuses(run_id()))
        self._keys = keys
        self._counts = counts or RefusalCounts(run_id())
        self._shed = 0
        self._logged_seconds = -math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, mark or refuse."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if path not in ROUTES or scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        door = self._keeper.look()
        if door is None:
            await self.app(scope, receive, send)
            return
        request = _Request(scope, receive)
        answer = None
        try:
            answer = await self._judge(request, door)
        # The boundary: a mistake in here must not cost a request.
        except Exception:
            if self._may_log():
                logger.exception("admission failed for a request; it passes as it came")
            request.restore()
        if answer is not None:
            await send_json(send, answer.status, answer.error, answer.headers)
            return
        await self.app(request.scope, request.receive, _with_state(send, door.state))

    async def _judge(self, request: _Request, door: AdmissionGate) -> _Answer | None:
        """The refusal, or None for a request that passes, marked where it has to be."""
        headers = request.scope["headers"]
        if self._keys is None:
            self._keys = _configured_keys(request.scope)
        kind = bound = self._keys.of(headers)
        body = await request.body()
        if body is not None:
            try:
                kind, marked = classify(body, headers, bound)
            except UnknownClassError as error:
                self._counts.count(UNKNOWN_CLASS)
                wrong = "invalid_request_error"
                return _Answer(400, openai_error(str(error), wrong, "unknown_class"))
            if marked is not body:
                request.replace(marked)
        if kind != FLEX or door.state is not AdmissionState.SHED:
            return None
        self._shed += 1
        if self._may_log():
            logger.warning("flex requests are refused: %d so far by this API server", self._shed)
        answer = _refusal(door)
        self._counts.count(THERMAL if door.thermal else POWER)
        return answer

    def _may_log(self) -> bool:
        now = time.monotonic()
        due = now - self._logged_seconds > _LOG_AGAIN_SECONDS
        if due:
            self._logged_seconds = now
        return due


class _Request:
    """A request whose body can be read here and by vLLM once more."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self._given = scope
        self._receive = receive
        self._seen: list[Message] = []
        self._replay: list[Message] = []

    async def body(self) -> bytes | None:
        """The whole body; None where it is too long, packed or cut off."""
        headers = dict(self.scope["headers"])
        if b"content-encoding" in headers or _number(headers.get(b"content-length")) > (
            MAX_BODY_BYTES
        ):
            return None
        length = 0
        while True:
            message = await self._receive()
            self._seen.append(message)
            self._replay.append(message)
            if message["type"] != "http.request":
                return None
            length += len(message.get("body", b""))
            if length > MAX_BODY_BYTES:
                return None
            if not message.get("more_body", False):
                return b"".join(each.get("body", b"") for each in self._seen)

    def replace(self, body: bytes) -> None:
        """Let vLLM read this body in place of the client's."""
        self._replay = [{"type": "http.request", "body": body, "more_body": False}]
        headers = [
            (name, str(len(body)).encode() if name == b"content-length" else value)
            for name, value in self._given["headers"]
        ]
        self.scope = {**self._given, "headers": headers}

    def restore(self) -> None:
        """Let vLLM read what the client sent."""
        self._replay = list(self._seen)
        self.scope = self._given

    async def receive(self) -> Message:
        """What was read here, then what comes after it."""
        return self._replay.pop(0) if self._replay else await self._receive()


def _number(text: bytes | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _configured_keys(scope: Scope) -> KeyClasses:
    state = getattr(scope.get("app"), "state", None)
    additional = getattr(getattr(state, "vllm_config", None), "additional_config", None)
    try:
        return KeyClasses(load_config(given_settings(additional), os.environ).api_key_classes)
    except ConfigError as error:
        # The engines have started with it, so it is this process that sees something else.
        logger.warning("no class is bound to an API key here: %s", error)
        return KeyClasses({})


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    error: dict[str, Any]
    headers: Sequence[Header] = ()


def _refusal(door: AdmissionGate) -> _Answer:
    jitter = 1.0 + _JITTER_RATIO * (2.0 * secrets.randbelow(1001) / 1000.0 - 1.0)
    wait = min(float(MAX_RETRY_SECONDS), max(1.0, (door.recovery_seconds or 1.0) * jitter))
    seconds = math.ceil(wait)
    message = (
        "this server is at its power budget and takes no flex work now; "
        f"try again in {seconds} s, or send it without the class flex"
    )
    return _Answer(
        429,
        openai_error(message, "rate_limit_error", "resource_unavailable"),
        [
            (b"retry-after", str(seconds).encode()),
            # The OpenAI client reads this one first; whole seconds alone would lose the jitter.
            (b"retry-after-ms", str(round(1000 * wait)).encode()),
            (STATE_HEADER, door.state.value.encode()),
        ],
    )


def _with_state(send: Send, state: AdmissionState) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (STATE_HEADER, state.value.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return sending
