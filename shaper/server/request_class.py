"""Which class of work an HTTP request asks for, and how its body carries that to the engine.

    flex  if its API key is bound to it
          else if `service_tier` is "flex", or vLLM's `priority` is above 0,
               or `vllm_xargs` says {"shaper_class": "flex"}
    interactive otherwise

A request with a key that is bound to interactive may still ask for flex. vLLM ignores
`service_tier` and knows no keys, so the body of a flex request gets the third form, which vLLM
hands to the scheduler with the sampling parameters. A body that is not a JSON object is left as
it is: vLLM refuses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from shaper.ipc.flex import CLASS_ARGUMENT, FLEX

WorkClass = Literal["interactive", "flex"]
INTERACTIVE: Final = "interactive"
CLASSES = (INTERACTIVE, FLEX)
DIGEST_PREFIX = "sha256:"
ARGUMENTS = "vllm_xargs"
PRIORITY_HEADER = b"x-vllm-priority"
# A body without any of these names no class; most have none, and are not parsed here.
_WORDS = (b"service_tier", b"priority", CLASS_ARGUMENT.encode())


class UnknownClassError(ValueError):
    """A request names an unknown class; the message lists the known ones."""


class KeyClasses:
    """Classes bound to API keys, looked up by digest.

    Args:
        classes: by key, or by `sha256:` and the hexadecimal SHA-256 of the key, so that no
            key has to stand in a configuration.
    """

    def __init__(self, classes: Mapping[str, WorkClass]) -> None:
        self._classes = {_key_digest(key): bound for key, bound in classes.items()}

    def of(self, headers: list[tuple[bytes, bytes]]) -> WorkClass | None:
        """The class that is bound to a request's key; None: there is none."""
        if not self._classes:
            return None
        for name, value in headers:
            name = name.lower()
            if name == b"authorization":
                scheme, _, value = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            elif name != b"x-api-key":  # as the Anthropic client sends it
                continue
            found = self._classes.get(hashlib.sha256(value.strip()).hexdigest())
            if found is not None:
                return found
        return None


def _key_digest(key: str) -> str:
    if key.startswith(DIGEST_PREFIX):
        return key.removeprefix(DIGEST_PREFIX).lower()
    return hashlib.sha256(key.encode()).hexdigest()


def classify(
    body: bytes, headers: list[tuple[bytes, bytes]], bound: WorkClass | None
) -> tuple[WorkClass, bytes]:
    """The class of a request, and the body that says so to the engine.

    Args:
        body: of the request.
        headers: lower-case names, as ASGI has them.
        bound: what its API key is bound to.

    Raises:
        UnknownClassError: the body names a class that there is not.
    """
    by_header = _header_priority(headers)
    asks = any(word in body for word in _WORDS)
    if bound != FLEX and not asks and not (by_header or 0) > 0:
        return INTERACTIVE, body
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return bound or INTERACTIVE, body
    if not isinstance(content, dict):
        return bound or INTERACTIVE, body
    arguments = content.get(ARGUMENTS)
    named = arguments.get(CLASS_ARGUMENT) if isinstance(arguments, dict) else None
    if named is not None and named not in CLASSES:
        raise UnknownClassError(
            f"{ARGUMENTS}.{CLASS_ARGUMENT} is {named!r}; there are {' and '.join(CLASSES)}"
        )
    priority = content.get("priority") if by_header is None else by_header
    flex = FLEX in (bound, named, content.get("service_tier")) or (
        isinstance(priority, int) and priority > 0
    )
    if not flex:
        return INTERACTIVE, body
    return FLEX, body if named == FLEX else _carrying(body, content)


def _header_priority(headers: list[tuple[bytes, bytes]]) -> int | None:
    """vLLM lets this header win over the body's `priority`."""
    for name, value in headers:
        if name.lower() == PRIORITY_HEADER:
            try:
                return int(value)
            except ValueError:
                return None
    return None


def _carrying(body: bytes, content: dict[str, Any]) -> bytes:
    """The body with the class in it; unchanged where vLLM would refuse it anyway."""
    arguments = content.get(ARGUMENTS)
    if not content or not (arguments is None or isinstance(arguments, dict)):
        return body
    if ARGUMENTS not in content and json.detect_encoding(body).startswith("utf-8"):
        # In front of the rest, which stays byte for byte what the client sent.
        said = json.dumps({ARGUMENTS: {CLASS_ARGUMENT: FLEX}})[1:-1].encode()
        brace = body.index(b"{") + 1
        return body[:brace] + said + b"," + body[brace:]
    content[ARGUMENTS] = {**(arguments or {}), CLASS_ARGUMENT: FLEX}
    return json.dumps(content).encode()
