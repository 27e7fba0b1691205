"""The control routes, as a layer around vLLM's API server.

    PUT     /v1/shaper/budget    put a budget in force, for a time or until it is cleared
    DELETE  /v1/shaper/budget    back to the configured and scheduled one
    PUT     /v1/shaper/mode      on, shadow, off
    PUT     /v1/shaper/record    have the engines write a recording; DELETE ends it
    GET     /v1/shaper/state     what was asked for, what holds, how each engine fares

They exist only where `SHAPER_ADMIN_KEY` is set, and want that key as a bearer token. A
request is looked at in this order: path, key, method, size, content. Whatever has no
business here goes on to vLLM untouched. vLLM's own keys open nothing here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
from typing import Any

from shaper.config.model import ShaperConfig
from shaper.config.sources import admin_key, given_settings, load_config
from shaper.errors import ConfigError
from shaper.ipc.control_file import ControlFile
from shaper.ipc.logs import share_log_handlers
from shaper.ipc.status_block import read_statuses, run_id
from shaper.ipc.wall_clock import wall_seconds
from shaper.server.asgi import App, Header, Receive, Scope, Send, openai_error, send_json
from shaper.server.control_service import Clocks, ControlService, RefusedError
from shaper.server.recordings import start_recording, stop_recording
from shaper.server.state import describe_state

logger = logging.getLogger(__name__)

PREFIX = "/v1/shaper"
METHODS = {
    f"{PREFIX}/budget": ("PUT", "DELETE"),
    f"{PREFIX}/mode": ("PUT",),
    f"{PREFIX}/record": ("PUT", "DELETE"),
    f"{PREFIX}/state": ("GET",),
}
# The longest request that makes sense has some tens of limits.
MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
_LOG_AGAIN_SECONDS = 60.0


class ControlRoutes:
    """ASGI middleware; vLLM makes one in every API server.

    Args:
        app: what is inside.
        key: the admin key; by default from the environment. None: no routes.
        desk: takes the requests; by default that of this run.
    """

    def __init__(
        self, app: App, *, key: str | None = None, desk: ControlService | None = None
    ) -> None:
        share_log_handlers()
        self.app = app
        key = key or admin_key(os.environ)
        self._digest = None if key is None else _digest(key.encode())
        if desk is None:
            run = run_id()
            clocks = Clocks(time.monotonic, wall_seconds)
            desk = ControlService(ControlFile(run), lambda: read_statuses(run), clocks)
        self._desk = desk
        self._denied = 0
        self._denied_logged_seconds: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is ours; pass on the rest."""
        path = ""
        if scope["type"] == "http" and self._digest is not None:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path != PREFIX and not path.startswith(f"{PREFIX}/"):
            await self.app(scope, receive, send)
            return
        headers: list[Header] = []
        try:
            status, answer = 200, await self._answer(scope, path, receive)
        except RefusedError as error:
            status, answer = error.status, _error(error)
            if status == 401:
                headers.append((b"www-authenticate", b"Bearer"))
            if status == 405:
                headers.append((b"allow", ", ".join(METHODS[path]).encode()))
        except Exception:
            # The boundary: a mistake in here is an answer, not a broken connection.
            logger.exception("a control request failed")
            status, answer = 500, _error(RefusedError(500, "internal", "see the server's log"))
        await send_json(send, status, answer, [*headers, (b"cache-control", b"no-store")])

    async def _answer(self, scope: Scope, path: str, receive: Receive) -> dict[str, Any]:
        self._authorise(scope)
        if path not in METHODS:
            routes = ", ".join(METHODS)
            raise RefusedError(404, "not_found", f"there is no {path}; there are {routes}")
        method = scope["method"]
        if method not in METHODS[path]:
            allowed = " and ".join(METHODS[path])
            raise RefusedError(405, "method_not_allowed", f"{path} takes {allowed}, not {method}")
        body = await _json_body(scope, receive)
        if method == "GET":
            return describe_state(self._desk, _config(scope))
        address = str((scope.get("client") or ("?",))[0])
        if path.endswith("/mode"):
            sequence = await self._desk.set_mode(body, address)
        elif path.endswith("/record") and method == "PUT":
            config = _config(scope)
            directory = None if config is None else config.recording_directory
            sequence = await start_recording(self._desk, body, address, directory)
        elif path.endswith("/record"):
            sequence = await stop_recording(self._desk, body, address)
        elif method == "PUT":
            sequence = await self._desk.set_budget(body, address)
        else:
            sequence = await self._desk.clear_budget(body, address)
        return {"sequence": sequence, **describe_state(self._desk, _config(scope))}

    def _authorise(self, scope: Scope) -> None:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Digests, so that not even the key's length shows in the time that this takes.
        right = hmac.compare_digest(_digest(token.strip()), self._digest or b"")
        if right and scheme.lower() == b"bearer":
            return
        self._denied += 1
        now, logged = time.monotonic(), self._denied_logged_seconds
        if logged is None or now - logged > _LOG_AGAIN_SECONDS:
            self._denied_logged_seconds = now
            address = str((scope.get("client") or ("?",))[0])
            logger.warning(
                "control request from %s without the admin key (%d so far)", address, self._denied
            )
        raise RefusedError(
            401, "invalid_admin_key", "give the server's SHAPER_ADMIN_KEY as a bearer token"
        )


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _error(error: RefusedError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return openai_error(error.message, kind, error.code)


def _config(scope: Scope) -> ShaperConfig | None:
    """What this run is configured with, as far as an API server can see it."""
    state = getattr(scope.get("app"), "state", None)
    additional = getattr(getattr(state, "vllm_config", None), "additional_config", None)
    try:
        return load_config(given_settings(additional), os.environ)
    except ConfigError:
        # The engines have started with it, so it is this process that sees something else.
        return None


async def _json_body(scope: Scope, receive: Receive) -> object:
    """The request's body; None where there is none.

    Raises:
        RefusedError: it is too long, too slow or no JSON object.
    """
    try:
        text = await asyncio.wait_for(_body(receive), BODY_SECONDS)
    except TimeoutError as error:
        raise RefusedError(408, "timeout", f"no whole body within {BODY_SECONDS:g} s") from error
    if not text.strip():
        return None
    try:
        body = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "invalid_json", f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise RefusedError(400, "invalid_json", "the body must be a JSON object")
    return body


async def _body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "disconnected", "the client has gone")
        chunks.append(message.get("body", b""))
        length += len(chunks[-1])
        if length > MAX_BODY_BYTES:
            raise RefusedError(413, "too_large", f"the body has more than {MAX_BODY_BYTES} bytes")
        if not message.get("more_body"):
            return b"".join(chunks)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which every key stands once: of two, nobody knows which was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
