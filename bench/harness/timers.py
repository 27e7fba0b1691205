"""Timers around a scheduler's calls and inside them, for `bench.overhead`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# CPU time of this thread: other work on the machine costs precision only.
_CLOCK = time.thread_time_ns
# The methods of a shaper that are timed one by one.
PARTS = {"decide": "_shape", "record": "_record", "return": "_finish"}


@dataclass(slots=True)
class _Step:
    """Nanoseconds of one step's two calls, all of them and vLLM's own; None before they came."""

    schedule: tuple[int, int]
    update: tuple[int, int] | None = None


class Timed:
    """Times a scheduler's two calls from outside and, by `own_methods`, from inside."""

    def __init__(self, scheduler: Any) -> None:
        self._inside = 0
        self.steps: list[_Step] = []
        self.polls: list[int] = []
        self._flying: dict[int, _Step] = {}
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def timed_schedule(*args: Any, **kwargs: Any) -> Any:
            self._inside = 0
            start = _CLOCK()
            output = schedule(*args, **kwargs)
            whole = _CLOCK() - start
            if output.total_num_scheduled_tokens:
                self._flying[id(output)] = step = _Step((whole, self._inside))
                self.steps.append(step)
            else:
                self.polls.append(whole - self._inside)
            return output

        def timed_update(output: Any, *args: Any, **kwargs: Any) -> Any:
            self._inside = 0
            start = _CLOCK()
            answer = update(output, *args, **kwargs)
            whole = _CLOCK() - start
            step = self._flying.pop(id(output), None)
            if step is not None:
                step.update = whole, self._inside
            return answer

        self._scheduler, self._plain = scheduler, (schedule, update)
        scheduler.schedule, scheduler.update_from_output = timed_schedule, timed_update

    def remove(self) -> None:
        """Time no more."""
        self._scheduler.schedule, self._scheduler.update_from_output = self._plain

    def inner(self, nanoseconds: int) -> None:
        """vLLM's own part of the call that goes on."""
        self._inside += nanoseconds

    def whole(self) -> list[float]:
        """Microseconds of each step's calls."""
        return [(s.schedule[0] + s.update[0]) / 1e3 for s in self.steps if s.update]

    def own(self) -> list[float]:
        """The part of vLLM's own methods in them."""
        return [(s.schedule[1] + s.update[1]) / 1e3 for s in self.steps if s.update]


@contextmanager
def own_methods_timed(timed: dict[int, Timed]) -> Iterator[None]:
    """vLLM's methods tell the `Timed` of their scheduler how long they took."""
    from vllm.v1.core.sched.scheduler import Scheduler

    def around(method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            start = _CLOCK()
            returned = method(self, *args, **kwargs)
            timed[id(self)].inner(_CLOCK() - start)
            return returned

        return call

    kept = Scheduler.schedule, Scheduler.update_from_output
    Scheduler.schedule, Scheduler.update_from_output = map(around, kept)
    try:
        yield
    finally:
        Scheduler.schedule, Scheduler.update_from_output = kept


@dataclass(slots=True)
class Parts:
    """Times methods of a shaper, one sample a call."""

    shaper: Any
    nanoseconds: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, name in PARTS.items():
            samples = self.nanoseconds.setdefault(part, [])
            setattr(self.shaper, name, self._timed(getattr(self.shaper, name), samples))

    def remove(self) -> None:
        """Time no more."""
        for name in PARTS.values():
            delattr(self.shaper, name)

    @staticmethod
    def _timed(method: Callable[..., Any], samples: list[int]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = _CLOCK()
            returned = method(*args)
            samples.append(_CLOCK() - start)
            return returned

        return call

    def medians(self) -> dict[str, float]:
        """Microseconds of each part."""
        return {k: statistics.median(v) / 1e3 if v else 0.0 for k, v in self.nanoseconds.items()}


def timer_microseconds() -> float:
    """What a pair of timers inside another shows of itself."""
    samples = []
    for _ in range(2000):
        start = _CLOCK()
        inner = _CLOCK()
        inner = _CLOCK() - inner
        samples.append(_CLOCK() - start - inner)
    return statistics.median(samples) / 1e3
