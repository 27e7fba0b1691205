"""Splits a streamed completion into events and keeps the time of each token.

An event is searched for a few bytes instead of being decoded as JSON; only the
last one of a stream, with the usage, and errors are decoded.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass

_MAX_EVENT_BYTES = 1024 * 1024

_EVENT_END = b"\n\n"
_TOKEN_MARK = b'"text":'
_NO_CHOICE = b'"choices":[]'


class StreamError(Exception):
    """The server's stream reports an error, or is not what it should be."""


@dataclass(slots=True)
class TokenStream:
    """Splits a response into events and keeps the time of each token chunk."""

    max_chunks: int
    token_seconds: array[float]
    usage_tokens: int | None = None
    finished: bool = False
    buffer: bytes = b""

    def feed(self, data: bytes, now_seconds: float) -> None:
        """Take what arrived at `now_seconds`.

        Raises:
            StreamError: an error event, an event without end, or more chunks
                than tokens were asked for.
        """
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        if self.buffer:
            data = self.buffer + data
        events = data.split(_EVENT_END)
        self.buffer = events.pop()
        if len(self.buffer) > _MAX_EVENT_BYTES:
            raise StreamError(f"an event of over {_MAX_EVENT_BYTES} bytes")
        for event in events:
            self._take(event, now_seconds)

    def _take(self, event: bytes, now_seconds: float) -> None:
        if _TOKEN_MARK in event:
            self.token_seconds.append(now_seconds)
            if len(self.token_seconds) > self.max_chunks:
                raise StreamError(f"more than the {self.max_chunks} tokens asked for")
        elif event.startswith(b"data: [DONE]"):
            self.finished = True
        elif event.startswith(b"data:"):
            self._take_rare(event[len(b"data:") :])

    def _take_rare(self, payload: bytes) -> None:
        """An event without a token: the usage at the end, or an error."""
        try:
            message = json.loads(payload)
        except ValueError as error:
            raise StreamError(f"an event that is no JSON: {payload[:200]!r}") from error
        if isinstance(message, dict) and "error" in message:
            detail = message["error"]
            text = detail.get("message") if isinstance(detail, dict) else detail
            raise StreamError(f"server: {text}")
        if isinstance(message, dict) and _NO_CHOICE in payload.replace(b" ", b""):
            usage = message.get("usage") or {}
            self.usage_tokens = usage.get("completion_tokens", self.usage_tokens)
