"""One engine's handle of a group: queries, reserves and commits, over rows in any buffer.

Why no interleaving of engines goes over a limit. A reservation is written first, so that all
others see it, and only then checked against what the others have written. If it does not fit,
the engine retracts it before anything is launched. Of two engines that reserve at the same time
the one whose check comes last has seen both reservations, so what both launch was found to fit
by at least one of them. This needs no lock, and holds for engines that are stopped or killed
between any two of these steps: what they wrote stays counted.

The claim lock only keeps two engines from retracting both reservations where one of them would
have fitted. An engine that can't take it in time must fit its static share as well,

    share = idle + (limit - sum(idle)) * GPUs / sum(GPUs)

of each limit: all shares together are the limit, so that engines on their shares never
refuse each other, and the visible sum binds only while one engine's draw beyond its share
lies within the window.

An engine also retracts a reservation that took so long that the engine must have been stopped
meanwhile: the step would start later than was checked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shaper.core.ledger.headroom import WindowPart
from shaper.core.ledger.shared import Committed, EngineShare, GroupView, Step
from shaper.core.types import PowerLimit
from shaper.group.fairness import fair_terms
from shaper.group.lock import ClaimLock
from shaper.group.reservations import Reading, Reservations, table_bytes
from shaper.group.usage import Question

# Who could not have the lock plans on its static share for so long, about a step: its share
# may be too little for any claim that would find the lock free again.
_STATIC_SECONDS = 0.01


class GroupLedger:
    """A `shaper.core.ledger.shared.PowerGroup` over rows.

    Args:
        rows: of the group.
        row: this engine's, open.
        limits: of the group.
        gate: to the lock of claims; None where no other engine can reserve meanwhile.
    """

    def __init__(
        self,
        rows: Reservations,
        row: int,
        limits: Sequence[PowerLimit],
        gate: ClaimLock | None = None,
    ) -> None:
        self._rows, self._row, self._gate = rows, row, gate
        self.limits = tuple(limits)
        self._asked: Question | None = None
        self._kept_ratio = 1.0
        self._seen: npt.NDArray[np.int64] | None = None
        self._static_until_seconds = -math.inf
        self._writing = threading.Lock()
        # What the plan was found from: each limit's window, then its static share's if asked.
        self._parts: tuple[WindowPart, ...] = ()
        self.claims = 0
        """Reservations that were entered."""
        self.refused = 0
        """Reservations that were taken back."""
        self.static_steps = 0
        """Reservations that were checked without the lock, on the static share; of either kind."""
        self.lock_wait_seconds = 0.0
        self.lock_wait_max_seconds = 0.0

    @property
    def static_limits(self) -> tuple[PowerLimit, ...]:
        """This engine's part of each limit; all parts together are the limit.

        It changes when engines join, and when the rows of those that left are freed.
        """
        table = self._rows.read().table
        idle_watts = float(table["idle_watts"].sum())
        own = self._rows.table[self._row]
        part = float(own["gpu_count"]) / float(table["gpu_count"].sum())
        return tuple(
            PowerLimit(float(own["idle_watts"]) + (x.watts - idle_watts) * part, x.window_seconds)
            for x in self.limits
        )

    def query(self, start_seconds: float, now_seconds: float, share: EngineShare) -> GroupView:
        """As in `PowerGroup`."""
        reading = self._rows.read()
        self._seen = reading.versions
        place = int(reading.rows.searchsorted(self._row))
        terms = fair_terms(reading.table, place, share, self.limits, now_seconds)
        self._kept_ratio = terms.kept_ratio
        asked = self._question(start_seconds, now_seconds, reading=reading)
        self._asked = asked
        parts = asked.parts(share.floor_watts)
        if now_seconds < self._static_until_seconds:
            # A plan that can't be claimed would be made again and again.
            own = self._question(start_seconds, now_seconds, static=True)
            parts += own.parts(share.floor_watts)
        self._parts = parts
        return GroupView(parts, *terms[1:])

    def _question(
        self,
        start_seconds: float,
        now_seconds: float,
        *,
        reading: Reading | None = None,
        static: bool = False,
        retracting: bool = False,
    ) -> Question:
        """What the limits leave, or where `static` this engine's share of them, taken alone."""
        limits = self.static_limits if static else self.limits
        watts = [limit.watts * self._kept_ratio for limit in limits]
        return Question(
            self._rows,
            watts,
            self._row,
            start_seconds,
            now_seconds,
            reading=reading,
            alone=static,
            retracting=retracting,
        )

    def publish(self, share: EngineShare, now_seconds: float) -> None:
        """As in `PowerGroup`."""
        with self._writing:
            self._rows.publish(self._row, share, now_seconds)

    def reserve_fixed(self, floor_watts: float, now_seconds: float) -> None:
        """Count this engine at `floor_watts` after what it has entered, until it says otherwise.

        For an engine that runs on without asking, called again and again while it does,
        from any thread: the time since the last call becomes what it drew. Takes no lock of
        the group.
        """
        with self._writing:
            row = self._row
            end, values = self._rows.end_seconds(row), self._rows.table[row]
            idle_watts = float(values["idle_watts"])
            # What it draws is no decode that a slower pace would make cheaper.
            share = EngineShare(floor_watts, prefill_watts=max(0.0, floor_watts - idle_watts))
            if end < now_seconds:
                parked = values["entered_seconds"] == math.inf
                watts = floor_watts if parked else idle_watts
                drawn = np.array([0.0, watts * (now_seconds - end)])
                times = np.array([end, now_seconds])
                self._rows.commit(row, Committed(end, times, drawn), share, now_seconds)
            self._rows.publish(row, share, math.inf)

    def reserve(
        self, committed: Committed, share: EngineShare, now_seconds: float, step: Step | None
    ) -> bool:
        """As in `PowerGroup`. False also where this engine was stopped meanwhile."""
        gate = self._gate
        if step is None and self._asked is not None:
            # A forced step was not checked, but its headroom will be recorded.
            self._asked.read()
        with self._writing:
            held = gate is None or self._enter(gate, now_seconds)
            try:
                self._rows.commit(self._row, committed, share, now_seconds)
                fits = step is None or self._fits(step, share, now_seconds, held)
                if not fits or (gate is not None and gate.late()):
                    self._rows.retract(self._row)
                    self.refused += 1
                    return False
            finally:
                if gate is not None:
                    gate.leave()
        self.claims += 1
        return True

    def _enter(self, gate: ClaimLock, now_seconds: float) -> bool:
        held = gate.enter()
        self._static_until_seconds = -math.inf if held else now_seconds + _STATIC_SECONDS
        self.static_steps += not held
        self.lock_wait_seconds += gate.waited_seconds
        self.lock_wait_max_seconds = max(self.lock_wait_max_seconds, gate.waited_seconds)
        return held

    def _fits(self, step: Step, share: EngineShare, now_seconds: float, held: bool) -> bool:
        """Whether a step that was entered fits beside what the others have entered by now."""
        asked = step.start_seconds, now_seconds
        checked = []
        if self._others_entered():
            checked.append((self._question(*asked, retracting=True), self._parts))
        if not held:
            static = self._question(*asked, static=True, retracting=True)
            checked.append((static, self._parts[len(self.limits) :]))
        seconds, watts = step.prediction.seconds, step.prediction.watts
        for question, planned in checked:
            parts = question.parts(share.floor_watts)
            for part, seen in zip(parts, planned, strict=False):
                part.lower_floor(seen.floor_watts)  # as far as decodes made way for the step
            if not all(part.fits(seconds, watts) for part in parts):
                return False
        return True

    def _others_entered(self) -> bool:
        """Whether anything was entered since the last look, by others."""
        if self._seen is None:
            return True
        versions = self._rows.versions.copy()
        versions[self._row] = self._seen[self._row]
        return versions.tobytes() != self._seen.tobytes()

    def commit(self, committed: Committed, share: EngineShare, now_seconds: float) -> None:
        """As in `PowerGroup`. Takes no lock of the group: what ran needs no check."""
        with self._writing:
            self._rows.commit(self._row, committed, share, now_seconds)


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
    rows = Reservations(bytearray(table_bytes(engines, limits)), engines, limits)
    for row in range(engines):
        rows.open(row, idle_watts, rest_watts, rest_after_seconds, start_seconds)
    return [GroupLedger(rows, row, limits) for row in range(engines)]
