"""What the load test sends: requests with an arrival time and two lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

# Printable ASCII: one token a byte in a byte-level vocabulary, a valid id in
# any other, and never a special token.
_FIRST_TOKEN_ID = 32
_LAST_TOKEN_ID = 126


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request, due `arrival_seconds` after the replay's start.

    `block_ids` names the prompt's text in blocks of `block_tokens`: equal ids
    are equal text, so that a prefix cache sees what it saw in the recorded
    traffic. Without ids the prompt is text of its own.
    """

    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    block_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of arrival, and what they are called in reports."""

    name: str
    requests: tuple[TimedRequest, ...]
    seed: int = 0

    @property
    def span_seconds(self) -> float:
        """Time of the last arrival."""
        return self.requests[-1].arrival_seconds if self.requests else 0.0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(request.output_tokens for request in self.requests)

    def clipped(self, duration_seconds: float, requests: int | None = None) -> Workload:
        """The part that arrives before `duration_seconds`, at most `requests` of it."""
        kept = tuple(r for r in self.requests if r.arrival_seconds < duration_seconds)
        return replace(self, requests=kept[:requests])

    def at_rate(self, rate_hertz: float) -> Workload:
        """The same requests with arrival times stretched to a mean rate.

        Raises:
            ValueError: the rate is not above 0.
        """
        if not (rate_hertz > 0 and math.isfinite(rate_hertz)):
            raise ValueError(f"a rate of {rate_hertz:g} requests/s is not above 0")
        if not self.span_seconds:
            return self
        factor = len(self.requests) / rate_hertz / self.span_seconds
        stretched = tuple(
            replace(r, arrival_seconds=r.arrival_seconds * factor) for r in self.requests
        )
        return replace(self, requests=stretched)


def prompt_token_ids(request: TimedRequest, index: int, seed: int) -> list[int]:
    """The prompt as `prompt_tokens` token ids, the same for the same seed.

    Args:
        request: whose prompt.
        index: its place in the workload; tells prompts without block ids apart.
        seed: of the workload.
    """
    if not request.block_ids:
        return _random_ids(request.prompt_tokens, (seed, 0, index))
    ids: list[int] = []
    for block in request.block_ids:
        ids += _random_ids(request.block_tokens, (seed, 1, block))
    return ids[: request.prompt_tokens]


def _random_ids(count: int, entropy: tuple[int, ...]) -> list[int]:
    rng = np.random.default_rng(entropy)
    ids: list[int] = rng.integers(_FIRST_TOKEN_ID, _LAST_TOKEN_ID + 1, count).tolist()
    return ids
