"""What the rows of a group leave and hold, summed over its engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shaper.core.ledger.curve import Array
from shaper.core.ledger.headroom import MOST_FLOOR_RATIO, WindowPart
from shaper.group.reservations import BINS, HEARD_SECONDS, Grid, Reading, Reservations, bins_of

# A reader begins again when a row has changed under it, 40 us at a time; a row changes
# some 200 times a second.
_READ_TRIES = 8
_INSTANT_SECONDS = 1e-6


class Question:
    """What the limits' windows leave for a step of row `own` that starts at `start_seconds`.

    The rows are read when the first window is asked about, and once: half of all plans follow
    from whose turn it is alone. Stateful fields: what was read.

    Args:
        rows: of the group.
        watts: what each limit's window may hold on the mean.
        own, start_seconds, now_seconds: as for `PowerGroup.look`.
        reading: the rows, just read; for an engine that retracts nothing and is not `alone`.
        alone: count nothing of other engines.
        retracting: as if what was entered last were taken back.
    """

    __slots__ = (
        *("_alone", "_corners", "_now_seconds", "_own", "_reading", "_retracting"),
        *("_rows", "_start_seconds", "_watts"),
    )

    def __init__(
        self,
        rows: Reservations,
        watts: Sequence[float],
        own: int,
        start_seconds: float,
        now_seconds: float,
        *,
        reading: Reading | None = None,
        alone: bool = False,
        retracting: bool = False,
    ) -> None:
        self._rows, self._watts, self._own = rows, watts, own
        self._start_seconds, self._now_seconds = start_seconds, now_seconds
        self._reading, self._alone, self._retracting = reading, alone, retracting
        self._corners: dict[int, _Corners] = {}

    def parts(self, floor_watts: float) -> tuple[WindowPart, ...]:
        """One for each limit; `floor_watts` is the engine's power after the step."""
        windows = self._rows.windows
        return tuple(
            [
                GroupWindow(self, index, windows[index], watts, floor_watts)
                for index, watts in enumerate(self._watts)
            ]
        )

    def corners(self, index: int) -> _Corners:
        """Of a limit's window."""
        self.read()
        return self._corners[index]

    def read(self) -> None:
        """Read the rows as they are now, unless that was done."""
        if self._corners:
            return
        rows, own, start = self._rows, self._own, self._start_seconds
        asked = np.array([own]) if self._alone else None
        reading = self._reading
        for _ in range(_READ_TRIES):
            if reading is None:
                reading = rows.read(asked, own if self._retracting else None)
            for grid in rows.grids:
                curve = _curve(grid, reading, own, start, self._now_seconds)
                for index in grid.judged:
                    window, allowed = rows.windows[index], self._watts[index]
                    ratio = curve.floor_ratio(allowed)
                    total = curve.joules + ratio * curve.floors
                    x, room = _room(curve.edges, total, start, window)
                    room += allowed * window
                    own_watts = curve.own_idle_watts
                    others = curve.idle_watts - own_watts + ratio * curve.others_floor_watts
                    self._corners[index] = _Corners(x, room, ratio, own_watts, others)
            if rows.versions.tobytes() == reading.versions.tobytes():
                break
            reading = None
        else:
            rows.torn += 1


class GroupWindow(WindowPart):
    """The part of one limit, summed over all rows when it is asked about."""

    __slots__ = ("_asked_watts", "_index", "_question")

    def __init__(
        self, question: Question, index: int, window_seconds: float, watts: float, floor: float
    ) -> None:
        super().__init__(window_seconds, watts, floor)
        self._question, self._index, self._asked_watts = question, index, floor

    def _solve(self) -> None:
        found = self._question.corners(self._index)
        idle_watts = found.own_idle_watts
        self._others_watts = found.others_watts
        self.floor_watts = min(
            self.floor_watts, idle_watts + found.floor_ratio * (self._asked_watts - idle_watts)
        )
        self._put(found.x, found.room)


class _Corners(NamedTuple):
    """What one window leaves, before the asking engine's floor."""

    x: Array
    """[corners] seconds after the start."""
    room: Array
    """[corners] joules that are left there."""
    floor_ratio: float
    """Part of each engine's floor above idle power that all of them can have."""
    own_idle_watts: float
    others_watts: float
    """What the others draw from now on: idle power, and that part of their floors."""


class _Curve(NamedTuple):
    """What engines have spent and will spend, at the bins' edges."""

    edges: Array
    """[edges] seconds."""
    joules: Array
    """[edges] since the first edge, with idle power after each engine's runs."""
    floors: Array
    """[edges] the same of what their floors are above idle power."""
    own_floor_watts: float
    """What the asking engine's floor is above idle power."""
    others_floor_watts: float
    """Sum of what the others' are."""
    own_idle_watts: float
    idle_watts: float
    """Of all engines."""

    def floor_ratio(self, watts: float) -> float:
        """Part of the floors that a limit leaves all engines: floors above it are taken as a
        part of it, as one engine's are."""
        most = max(MOST_FLOOR_RATIO * watts - self.idle_watts, 0.0)
        return min(1.0, most / max(self.own_floor_watts + self.others_floor_watts, 1e-9))


class _Spent(NamedTuple):
    """Bins of all rows over some time, with what follows each row's runs."""

    edges: Array
    """[bins + 1] seconds."""
    joules: Array
    """[rows, bins]"""
    after: npt.NDArray[np.bool_]
    """[rows, bins] whether a bin lies after the row's runs."""
    quiet_watts: Array
    """[rows] idle power, or the floor of a parked engine."""
    heard: npt.NDArray[np.bool_]
    """[rows] whether what the engine said last still counts."""


def _spent(
    grid: Grid, reading: Reading, begin_seconds: float, until_seconds: float, now_seconds: float
) -> _Spent:
    """After its runs an engine is idle, then at rest; a parked one stays at its floor."""
    length, table = grid.bin_seconds, reading.table
    end = table["end_seconds"]
    first = math.floor(begin_seconds / length)
    last = min(math.ceil(until_seconds / length), first + BINS)
    edges: Array = np.arange(first, last + 1, dtype=np.float64) * length
    joules = bins_of(grid.ring, reading.copies, first, last - first)
    after = edges[:-1] > end[:, None]
    idle, said = table["idle_watts"], np.maximum(table["entered_seconds"], end)
    heard = said >= now_seconds - HEARD_SECONDS
    rest_from = end + table["rest_after_seconds"]
    if np.maximum.reduce(said) == np.inf:
        parked = said == np.inf
        idle = np.where(parked, np.maximum(table["floor_watts"], idle), idle)
        rest_from[parked] = np.inf
    np.copyto(joules, (idle * length)[:, None], where=after)
    if np.minimum.reduce(rest_from) < edges[-1]:
        now = max(math.floor(now_seconds / length) - first, 0)
        for row in np.flatnonzero(rest_from < edges[-1]).tolist():
            begin = max(math.ceil(rest_from[row] / length) - first, 0)
            # Who has said lately what it will draw is not at rest for long.
            until = now if heard[row] else None
            joules[row, begin:until] = table["rest_watts"][row] * length
    return _Spent(edges, joules, after, idle, heard)


def _curve(
    grid: Grid, reading: Reading, own: int, start_seconds: float, now_seconds: float
) -> _Curve:
    """All rows, from a window before the start to one after it, or to the last run's end.

    Of row `own` only what lies before the step counts.
    """
    length, reach, table = grid.bin_seconds, grid.reach_seconds, reading.table
    until = max(start_seconds + reach, float(np.maximum.reduce(table["end_seconds"])))
    found = _spent(grid, reading, start_seconds - reach, until, now_seconds)
    edges, spent = found.edges, found.joules
    first = math.floor((start_seconds - reach) / length)
    above = np.maximum(table["floor_watts"] - found.quiet_watts, 0.0) * found.heard
    mine = int(reading.rows.searchsorted(own))
    spent[mine, max(math.ceil(start_seconds / length) - first, 0) :] = 0.0
    own_watts = float(above[mine])
    above[mine] = 0.0
    others_watts = float(np.add.reduce(above))
    now = max(math.floor(now_seconds / length) - first, 0)
    joules, floors = np.zeros(len(edges)), np.zeros(len(edges))
    np.add.accumulate(np.add.reduce(spent), out=joules[1:])
    if np.maximum.reduce(above) > 0.0:
        np.add.accumulate((above * length) @ found.after[:, now:], out=floors[now + 1 :])
    idle = found.quiet_watts
    return _Curve(
        edges,
        joules,
        floors,
        own_watts,
        others_watts,
        float(idle[mine]),
        float(np.add.reduce(idle)),
    )


def mean_watts(
    rows: Reservations, reading: Reading, window_seconds: float, now_seconds: float
) -> Array:
    """[engines] mean power of each until now, as entered.

    Args:
        rows: of the group.
        reading: of the engines asked about.
        window_seconds: of a limit, or less.
        now_seconds: now.
    """
    grid = next((g for g in rows.grids if window_seconds <= g.reach_seconds), rows.grids[-1])
    window = min(window_seconds, grid.reach_seconds)
    begin = now_seconds - window
    found = _spent(grid, reading, begin, now_seconds, now_seconds)
    low, high = np.clip(found.edges[:-1], begin, None), np.clip(found.edges[1:], None, now_seconds)
    watts: Array = found.joules @ ((high - low) / (grid.bin_seconds * window))
    return watts


def _room(
    edges: Array, total: Array, start_seconds: float, window_seconds: float
) -> tuple[Array, Array]:
    """Corners after the start, and minus what a window holds that ends there.

    A window that ends more than its length after the start holds less of the step, but may
    hold more of runs that others have committed so far ahead: the last corner stands for
    the fullest of those.
    """
    first, last = edges.searchsorted(
        (start_seconds + _INSTANT_SECONDS, start_seconds + window_seconds)
    )
    x = np.empty(last - first + 2)
    x[0], x[-1] = 0.0, window_seconds
    np.subtract(edges[first:last], start_seconds, out=x[1:-1])
    room = np.interp(x + (start_seconds - window_seconds), edges, total)
    room -= np.interp(x + start_seconds, edges, total)
    later = edges[last:]
    if len(later) > 1:
        full = np.interp(later, edges, total) - np.interp(later - window_seconds, edges, total)
        room[-1] = min(room[-1], -float(np.maximum.reduce(full)))
    return x, room
