"""One engine's handle of a group: looks, claims and enters, over rows in any buffer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from shaper.core.group import Committed, EngineShare, GroupView, Step
from shaper.core.types import PowerLimit
from shaper.fleet.fair import others_due_seconds, others_held_seconds, pace
from shaper.fleet.rows import Rows, table_bytes


class GroupLedger:
    """A `shaper.core.group.PowerGroup` over rows.

    Args:
        rows: of the group.
        row: this engine's, open.
        limits: of the group.
        lock: held while a claim is checked and entered.
    """

    def __init__(
        self,
        rows: Rows,
        row: int,
        limits: Sequence[PowerLimit],
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._rows, self._row = rows, row
        self.limits = tuple(limits)
        self._lock = lock or nullcontext()

    def look(
        self, start_seconds: float, now_seconds: float, share: EngineShare, kept_ratio: float
    ) -> GroupView:
        """See `PowerGroup.look`."""
        parts = tuple(
            self._rows.part(
                limit, self._row, start_seconds, now_seconds, share.floor_watts, kept_ratio
            )
            for limit in self.limits
        )
        used = np.flatnonzero(self._rows.table["used"])
        table = self._rows.table[used]
        own = int(used.searchsorted(self._row))
        cadence, sustained = pace(table, own, self.limits, kept_ratio, now_seconds)
        held = others_held_seconds(table, own, now_seconds)
        due = others_due_seconds(table, own, now_seconds)
        return GroupView(parts, sustained, cadence, held, due)

    def tell(self, share: EngineShare, now_seconds: float) -> None:
        """See `PowerGroup.tell`."""
        self._rows.tell(self._row, share, now_seconds)

    def claim(
        self, committed: Committed, share: EngineShare, now_seconds: float, step: Step | None
    ) -> bool:
        """See `PowerGroup.claim`."""
        with self._lock:
            self._rows.enter(self._row, committed, share, now_seconds)
        return True

    def enter(self, committed: Committed, share: EngineShare, now_seconds: float) -> None:
        """See `PowerGroup.enter`."""
        with self._lock:
            self._rows.enter(self._row, committed, share, now_seconds)


def memory_groups(
    limits: Sequence[PowerLimit],
    engines: int,
    *,
    idle_watts: float,
    rest_watts: float,
    rest_after_seconds: float,
    start_seconds: float = 0.0,
) -> list[GroupLedger]:
    """A group within one process: a handle for each of so many equal engines."""
    rows = Rows(bytearray(table_bytes(engines)), engines)
    for row in range(engines):
        rows.open(row, idle_watts, rest_watts, rest_after_seconds, start_seconds)
    return [GroupLedger(rows, row, limits) for row in range(engines)]
