"""Many engines in one order of time.

Law: of all engines, the one whose next event is due first does it, and of two that are
due at once the one with the lower index; what arrives at a time comes before what is due
then. An event happens at its engine's time, which is never before that of the event
before it. So an engine finds in a shared ledger what others did by then, and nothing of
what they will do: a step's end is heard of when it is over.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

from shaper.simulate.engine import VirtualEngine


class VirtualRack:
    """Engines that run side by side. Stateful fields: the time, and who is due when.

    Args:
        engines: in the order in which ties are broken; none has anything to do yet.
    """

    def __init__(self, engines: Sequence[VirtualEngine]) -> None:
        self.engines = tuple(engines)
        self.now_seconds = 0.0
        self.events = 0
        self._due: list[tuple[float, int]] = []  # a heap: one entry for each busy engine

    def arrive(self, index: int, request: Any, at_seconds: float) -> None:
        """A vLLM request reaches engine `index`; all that is due before must have been done.

        Raises:
            ValueError: it is in the past.
        """
        if at_seconds < self.now_seconds:
            raise ValueError(f"an arrival at {at_seconds} s, but it is {self.now_seconds} s")
        engine = self.engines[index]
        was_busy = engine.busy
        engine.arrive(request, at_seconds)
        if not was_busy:
            heapq.heappush(self._due, (engine.due_seconds, index))

    def run_until(self, seconds: float) -> None:
        """Do all that is due before `seconds`; then it is that time."""
        due = self._due
        while due and due[0][0] < seconds:
            self.now_seconds, index = due[0]
            engine = self.engines[index]
            engine.next_event()
            self.events += 1
            following = engine.due_seconds
            if following == math.inf:
                heapq.heappop(due)
            else:
                heapq.heapreplace(due, (following, index))
        self.now_seconds = max(self.now_seconds, seconds)
