"""The control routes: a FastAPI application, and the layer around vLLM's API server that has it.

    PUT     /v1/shaper/budget        put a budget in force, for a time or until it is cleared
    DELETE  /v1/shaper/budget        back to the configured and scheduled one
    PUT     /v1/shaper/mode          on, shadow, off
    PUT     /v1/shaper/record        have the engines write a recording; DELETE ends it
    GET     /v1/shaper/state         what was asked for, what holds, how each engine fares
    GET     /v1/shaper/openapi.json  this table for programs

The routes exist only where `SHAPER_ADMIN_KEY` is set, and every request must give that key as a
bearer token. A request is checked in this order: path, key, method, size, content. All other
paths go on to vLLM untouched. vLLM's own keys open no control route.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import shaper
from shaper.config.sources import admin_key
from shaper.ipc.control_file import ControlFile
from shaper.ipc.engine_record import read_statuses
from shaper.ipc.logs import share_log_handlers
from shaper.ipc.status_block import run_id
from shaper.server.asgi import (
    App,
    LogLimit,
    Message,
    Receive,
    Scope,
    Send,
    openai_error,
    route_path,
    server_config,
)
from shaper.server.control_service import ControlService
from shaper.server.requests import ErrorAnswer, RefusedError, parsed
from shaper.server.state import State

logger = logging.getLogger(__name__)

PREFIX = "/v1/shaper"
# The longest request that makes sense has some tens of limits.
MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 408, 409, 413, 422, 503, 504)
}


class ControlRoutes:
    """ASGI middleware that serves the control routes; vLLM makes one in every API server.

    Args:
        app: what is inside.
        key: the admin key; by default from the environment. None: no routes.
        service: does what is asked; by default made for this run with the first request.
    """

    def __init__(
        self, app: App, *, key: str | None = None, service: ControlService | None = None
    ) -> None:
        share_log_handlers()
        self.app = app
        self._key = key or admin_key(os.environ)
        self._service = service
        self._control: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand control requests to the control application and all others to vLLM."""
        path = route_path(scope) if scope["type"] == "http" and self._key else ""
        if path != PREFIX and not path.startswith(f"{PREFIX}/"):
            await self.app(scope, receive, send)
            return
        if self._control is None:
            # The settings are in the state of vLLM's application, which a request brings.
            self._control = control_app(self._service or _service_of_run(scope), self._key or "")
        await self._control(dict(scope), receive, send)


def _service_of_run(scope: Scope) -> ControlService:
    run = run_id()
    return ControlService(ControlFile(run), lambda: read_statuses(run), server_config(scope))


def control_app(service: ControlService, key: str) -> FastAPI:
    """The control routes as an application of their own.

    Args:
        service: does what is asked.
        key: the admin key that every request must give.
    """
    app = FastAPI(
        title="vLLM shaper",
        version=shaper.__version__,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    # `AdminKey` checks the key. This dependency is how OpenAPI says that there is one.
    router = APIRouter(
        prefix=PREFIX,
        route_class=ControlRoute,
        dependencies=[Depends(HTTPBearer(auto_error=False))],
        responses=_ERRORS,
    )
    for method, path, endpoint in (
        ("PUT", "/budget", service.set_budget),
        ("DELETE", "/budget", service.clear_budget),
        ("PUT", "/mode", service.set_mode),
        ("PUT", "/record", service.start_recording),
        ("DELETE", "/record", service.stop_recording),
        ("GET", "/state", service.state),
    ):
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=State,
            response_model_exclude_unset=True,
        )
    app.include_router(router)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RefusedError, _refused)
    app.add_middleware(AdminKey, key=key)
    return app


class AdminKey:
    """ASGI middleware that lets requests with the admin key pass, and answers others with 401."""

    def __init__(self, app: App, key: str) -> None:
        self.app = app
        self._digest = _digest(key.encode())
        self._denied = 0
        self._log = LogLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key of an HTTP request; no answer may be stored by a cache."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def uncached(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"cache-control", b"no-store")]
                message = {**message, "headers": headers}
            await send(message)

        if self._right(scope):
            await self.app(scope, receive, uncached)
            return
        self._denied += 1
        if self._log.due():
            address = str((scope.get("client") or ("?",))[0])
            logger.warning(
                "control request from %s without the admin key (%d so far)", address, self._denied
            )
        message = "give the server's SHAPER_ADMIN_KEY as a bearer token"
        answer = _error(401, "invalid_admin_key", message, {"www-authenticate": "Bearer"})
        await answer(scope, receive, uncached)

    def _right(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Digests, so that not even the key's length shows in the time that this takes.
        right = hmac.compare_digest(_digest(token.strip()), self._digest)
        return right and scheme.lower() == b"bearer"


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


class ControlRoute(APIRoute):
    """Reads a JSON body, whatever its type is said to be, and says in words what is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, with the body checked before and errors put in words after."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if route_path(request.scope) != self.path:
                raise HTTPException(404)  # Starlette's pattern lets a line break at the end pass
            try:
                return await handle(await _with_json(request))
            except RefusedError:
                raise
            except RequestValidationError as error:
                parsed(get_type_hints(self.endpoint)["asked"], error.body)
                raise
            except Exception as error:
                # The boundary: a mistake in here is an answer, not a broken connection.
                logger.exception("a control request failed")
                raise RefusedError(500, "internal", "see the server's log") from error

        return handler


async def _with_json(request: Request) -> Request:
    """The request with its whole body, a JSON object; without a body, an empty one.

    Raises:
        RefusedError: the body is too long, too slow or no JSON object.
    """
    try:
        text = await asyncio.wait_for(_body(request), BODY_SECONDS)
    except TimeoutError as error:
        raise RefusedError(408, "timeout", f"no whole body within {BODY_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise RefusedError(400, "disconnected", "the client has gone") from error
    text = text if text.strip() else b"{}"
    try:
        body = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "invalid_json", f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise RefusedError(400, "invalid_json", "the body must be a JSON object")

    async def receive() -> Message:
        return {"type": "http.request", "body": text, "more_body": False}

    headers = [pair for pair in request.scope["headers"] if pair[0].lower() != b"content-type"]
    headers.append((b"content-type", b"application/json"))
    return Request({**request.scope, "headers": headers}, receive)


async def _body(request: Request) -> bytes:
    text = bytearray()
    async for chunk in request.stream():
        text += chunk
        if len(text) > MAX_BODY_BYTES:
            raise RefusedError(413, "too_large", f"the body has more than {MAX_BODY_BYTES} bytes")
    return bytes(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which every key stands once: of two, it is not clear which was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _no_route(request: Request, error: Exception) -> Response:
    """404 with the routes that there are, or 405 with the methods that this one takes."""
    path = route_path(request.scope)
    methods: dict[str, list[str]] = {}
    for route in request.app.routes:
        methods.setdefault(route.path, []).extend(sorted(route.methods))
    if path not in methods:
        routes = ", ".join(methods)
        return _error(404, "not_found", f"there is no {path}; there are {routes}")
    allowed = methods[path]
    message = f"{path} takes {' and '.join(allowed)}, not {request.method}"
    return _error(405, "method_not_allowed", message, {"allow": ", ".join(allowed)})


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _error(error.status, error.code, error.message)


def _error(
    status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(openai_error(message, kind, code), status, headers)
