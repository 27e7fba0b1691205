"""Flex work in the engine: its mark, when it is deferred, what other threads may read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from shaper.core.supervise.admission import FlexRules
from shaper.core.supervise.status import EngineStatus

CLASS_ARGUMENT = "shaper_class"
"""The key of `sampling_params.extra_args` (`vllm_xargs` of a request) that names its class."""
FLEX: Final = "flex"
REFUSED = "flex_wait_exceeded"
"""The `stop_reason` of a request that was refused at its bound."""
# The supervisor writes every 20 ms: a status older than this says nothing of the engine now.
STALE_SECONDS = 2.0
RELEASED = ("room", "aged", "timeout", "off")
"""Why a deferred request was let in."""


class ShapingState(Protocol):
    """The part of the engine's shaper that says whether and how to defer."""

    standing: EngineStatus | None
    flex: FlexRules

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds."""
        ...

    @property
    def shaping(self) -> bool:
        """Whether what is decided is applied: not in shadow, off, or after a failure."""
        ...


@dataclass(frozen=True, slots=True)
class FlexQueue:
    """What other threads may read of the queue. Times are moments, not durations."""

    deferred_requests: int = 0
    oldest_deferred_seconds: float | None = None
    """When the oldest deferred request arrived."""
    waiting_since_seconds: float | None = None
    """When the oldest interactive prompt that has not started arrived."""
    deferrals: int = 0
    released: tuple[int, ...] = (0,) * len(RELEASED)
    """In the order of `RELEASED`."""
    refused: int = 0
    errors: int = 0

    def wait_seconds(self, now_seconds: float) -> float:
        """Age of the oldest interactive prompt that has not started."""
        since = self.waiting_since_seconds
        return 0.0 if since is None else max(0.0, now_seconds - since)


def is_flex(request: Any) -> bool:
    """Whether a request of vLLM's is of the class `flex`."""
    parameters = request.sampling_params
    arguments = None if parameters is None else parameters.extra_args
    if arguments and arguments.get(CLASS_ARGUMENT) == FLEX:
        return True
    return bool(request.priority > 0)


def flex_queue(scheduler: Any) -> FlexQueue | None:
    """The flex requests that a scheduler has deferred; None before it can."""
    deferral = getattr(scheduler, "deferral", None)
    queue: FlexQueue | None = None if deferral is None else deferral.queue
    return queue
