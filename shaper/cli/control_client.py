"""Requests to the control routes of a running server, for the commands that change or show it."""

from __future__ import annotations

import argparse
import getpass
import http.client
import json
import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from shaper.config.sources import ADMIN_KEY_VARIABLE, admin_key
from shaper.errors import ConfigError, ControlError

DEFAULT_URL = "http://127.0.0.1:8000"
# The server waits 5 s for its engines; the rest is for a busy host.
_ANSWER_SECONDS = 20.0


def signed(options: argparse.Namespace) -> dict[str, Any]:
    """Who asks, and why (`options.why`)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return {"who": f"{user}@{socket.gethostname()}"[:100], "why": options.why}


def ask(
    options: argparse.Namespace, method: str, route: str, body: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One request to the server's control routes; its answer.

    It follows no redirect and uses no proxy: the key is for the server that was named.

    Raises:
        ConfigError: there is no key, or `options.url` is none.
        ControlError: the server is not there, or refuses.
    """
    key = admin_key(os.environ)
    if key is None:
        raise ConfigError(f"set {ADMIN_KEY_VARIABLE} to the key that the server was started with")
    base = options.url.rstrip("/").removesuffix("/v1")
    connection = _connection(options.url, base)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    text = None if body is None else json.dumps(body).encode()
    try:
        connection.request(method, f"{urlsplit(base).path}/v1/shaper/{route}", text, headers)
        answer = connection.getresponse()
        said = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ControlError(
            f"no server answers at {base} ({error}): is it up? Give its address with --url"
        ) from error
    finally:
        connection.close()
    try:
        found = json.loads(said)
        problem = ""
    except ValueError as error:
        found, problem = None, f": {error}"
    if answer.status != 200:
        raise ControlError(_refusal(answer, found, base))
    if not isinstance(found, dict) or "engines" not in found:
        raise ControlError(f"{base} answers, but not as this server would{problem}")
    return found


def _connection(url: str, base: str) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(base)
        if not parts.hostname or parts.scheme not in ("http", "https"):
            raise ValueError("it has no host, or another scheme")
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=_ANSWER_SECONDS)
    except ValueError as error:
        raise ConfigError(f"--url {url!r} is no URL of a server; write {DEFAULT_URL}") from error


def _refusal(answer: http.client.HTTPResponse, found: Any, base: str) -> str:
    detail = found.get("error") if isinstance(found, dict) else None
    code = detail.get("code") if isinstance(detail, dict) else None
    if answer.status == 401 and code == "invalid_admin_key":
        return f"{base} refuses the key: {ADMIN_KEY_VARIABLE} is not what it was started with"
    if isinstance(detail, dict) and isinstance(code, str) and answer.status != 404:
        return f"{base} says: {detail.get('message')}"
    if answer.status in (401, 404):
        return (
            f"{base} has no control routes: start the server with {ADMIN_KEY_VARIABLE} set and "
            "with the shaper in it"
        )
    return f"{base} answers with {answer.status}: {answer.reason}"
