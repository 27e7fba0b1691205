"""ASGI's words, and what our layers around vLLM's server share."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from shaper.config.model import ShaperConfig
from shaper.config.sources import given_settings, load_config
from shaper.errors import ConfigError

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

_LOG_AGAIN_SECONDS = 60.0


def openai_error(message: str, kind: str, code: str) -> dict[str, Any]:
    """The body of an error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def send_json(
    send: Send, status: int, answer: dict[str, Any], headers: Sequence[Header] = ()
) -> None:
    """Answer a request."""
    body = json.dumps(answer).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


def route_path(scope: Scope) -> str:
    """The path of a request below the server's root path; empty where there is none."""
    path: str = scope.get("path", "")
    return path.removeprefix(scope.get("root_path", ""))


def server_config(scope: Scope) -> ShaperConfig | None:
    """The settings of this run; None where this process can't read them."""
    state = getattr(scope.get("app"), "state", None)
    additional = getattr(getattr(state, "vllm_config", None), "additional_config", None)
    try:
        return load_config(given_settings(additional), os.environ)
    except ConfigError as error:
        # The engines have started with them, so it is this process that sees something else.
        logger.warning("this API server can't read the shaper's settings: %s", error)
        return None


class LogLimit:
    """Lets one line a minute into the log."""

    def __init__(self) -> None:
        self._logged_seconds = -math.inf

    def due(self) -> bool:
        """Whether a line may be logged now; it then counts as logged."""
        now = time.monotonic()
        if now - self._logged_seconds <= _LOG_AGAIN_SECONDS:
            return False
        self._logged_seconds = now
        return True
