"""The parts of a tick, kept apart: one that fails costs itself alone, is counted and said.

What is only shown must never stop what is controlled, and no failure may stay uncounted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

_log = logging.getLogger(__name__)

Part = Literal[
    # What is measured.
    "reader",
    "reading",
    # What is controlled.
    "control",
    "group",
    "supervisor",
    "health",
    "thermal",
    "admission",
    # What is shown or recorded.
    "states",
    "recording",
    "limit_changes",
    "meter_windows",
    "sensor_report",
    "status_block",
    "flex",
    "decision_log",
    "step_meter",
    "counters",
    "tick",
]
PARTS: tuple[Part, ...] = get_args(Part)
"""In the order in which they are shown."""

_T = TypeVar("_T")


class Parts:
    """Runs parts, and counts their failures. May be shared by threads: a count that two of
    them raise at once may miss one. Stateful fields: the counts, and what was said."""

    def __init__(self) -> None:
        self.errors: dict[Part, int] = dict.fromkeys(PARTS, 0)
        """Failures since the start, by part."""
        self._said: set[tuple[Part, type[Exception]]] = set()

    def run(self, part: Part, call: Callable[..., _T], *arguments: object) -> _T | None:
        """What the call returns; None where it raises, which is counted, and logged once for
        each part and kind of error."""
        try:
            return call(*arguments)
        # The boundary between the parts: whatever is wrong in one, the others go on.
        except Exception as error:
            self.failed(part, error)
            return None

    def failed(self, part: Part, error: Exception) -> None:
        """Count a failure that was caught elsewhere, and say it once."""
        self.errors[part] += 1
        key = part, type(error)
        if key not in self._said:
            self._said.add(key)
            _log.warning(
                "the shaper's %s failed: %s: %s (said once; later failures are counted)",
                part.replace("_", " "),
                type(error).__name__,
                error,
                exc_info=error,
            )
