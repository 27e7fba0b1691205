"""The rows of a group: what each engine has committed, on grids that all of them read.

Law. Power over time is kept as joules in bins of fixed length, aligned to the monotonic
clock: bin `b` is `[b, b + 1) * bin_seconds`, at place `b % BINS` of a ring. A row is
written by its own engine only, so that an engine which dies in the middle leaves no sum
wrong but its own. A row's bins are valid up to its end; after that the engine is taken to
draw idle power until now and its floor from now on, for as long as it has been heard of
lately, and idle power else.

Each row is there twice. A version says which copy counts by its lowest bit: an engine
writes the other one, then turns the version, so that no engine ever reads half a row, however
long its engine is stopped in the middle, and turning the version again takes it back.

Windows are judged on the first grid of `GRIDS` that reaches them. Within a bin power is
taken as even: for an engine whose power changes by `p` within a bin that moves at most
`p * bin_seconds / 4` joules at each end of a window: with 1 ms, one engine of eight that
changes by its whole share of a limit over 100 ms at both ends moves 0.06% of it. A window
that is no whole number of bins is judged at corners of its end only, which adds as much
again.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shaper.core.ledger.curve import Array
from shaper.core.ledger.shared import Committed, EngineShare
from shaper.core.types import PowerLimit
from shaper.errors import LedgerError

Table = npt.NDArray[np.void]

BINS = 4096
GRIDS = ((0.001, 0.5), (0.004, 4.0), (0.04, 60.0))
"""Seconds of a bin, and of the longest window that is judged on it: twice the window fits
the ring with seconds to spare for what is committed."""
MAX_WINDOW_SECONDS = GRIDS[-1][1]
# What an engine last said of itself counts for so long after its last run: it asks every
# millisecond while it has work.
HEARD_SECONDS = 0.05
# What is committed further ahead counts as floor until it comes near: the shortest bins
# reach so far, with the longest of their windows behind.
AHEAD_SECONDS = 3.5
_FENCE = threading.Lock()

ROW = np.dtype(
    [
        ("used", np.int64),
        ("gpu_count", np.int64),
        ("end_seconds", np.float64),
        ("entered_seconds", np.float64),
        ("idle_watts", np.float64),
        ("rest_watts", np.float64),
        ("rest_after_seconds", np.float64),
        ("floor_watts", np.float64),
        ("decode_joules", np.float64),
        ("decode_seconds", np.float64),
        ("prefill_watts", np.float64),
        ("burst_joules", np.float64),
        ("waiting_since_seconds", np.float64),
        ("waiting_joules", np.float64),
        ("decodes_due_seconds", np.float64),
        ("margin_ratio", np.float64),
    ]
)
"""`end_seconds` is filled in where a table is read; `entered_seconds` is infinity where the
floor goes on until the engine says otherwise; `waiting_since_seconds` and
`decodes_due_seconds` are NaN where there is nothing of it."""

_SAID = (
    *("floor_watts", "decode_joules", "decode_seconds", "prefill_watts", "burst_joules"),
    *("waiting_since_seconds", "waiting_joules", "decodes_due_seconds", "margin_ratio"),
    "entered_seconds",
)


@dataclass(frozen=True, slots=True)
class Grid:
    """One resolution."""

    bin_seconds: float
    ring: npt.NDArray[np.float64]
    """[2 * rows, BINS] joules."""
    judged: tuple[int, ...]
    """Places of the limits that are judged on it."""
    reach_seconds: float
    """The longest of their windows."""


class Reading(NamedTuple):
    """The rows as they were at one moment."""

    versions: npt.NDArray[np.int64]
    """[capacity]"""
    rows: npt.NDArray[np.intp]
    """[engines] in the group."""
    copies: npt.NDArray[np.intp]
    """[engines] the copy of each row that counts."""
    table: Table
    """[engines]"""


def _grid_of(limit: PowerLimit) -> tuple[float, float]:
    return next(grid for grid in GRIDS if limit.window_seconds <= grid[1])


def table_bytes(capacity: int, limits: Sequence[PowerLimit]) -> int:
    """The size of a buffer for this many rows, judged by these limits."""
    rings = len({_grid_of(limit) for limit in limits}) * BINS
    return capacity * (8 + ROW.itemsize + 2 * 8 * (1 + rings))


class Reservations:
    """All rows, over a buffer that processes share or one of this process.

    Args:
        buffer: `table_bytes(capacity, limits)` bytes, zeros at first.
        capacity: how many engines there may be.
        limits: one at least, with windows of at most 60 s.
        offset: where in the buffer they begin, a multiple of 8.
    """

    def __init__(
        self,
        buffer: memoryview | bytearray | mmap.mmap,
        capacity: int,
        limits: Sequence[PowerLimit],
        offset: int = 0,
    ) -> None:
        self.versions: npt.NDArray[np.int64] = np.ndarray((capacity,), np.int64, buffer, offset)
        offset += capacity * 8
        self.table: Table = np.ndarray((capacity,), ROW, buffer, offset)
        # One assignment for what an engine says takes a quarter of the time of eight.
        self._said = self.table[list(_SAID)]
        offset += capacity * ROW.itemsize
        self._ends: Array = np.ndarray((2 * capacity,), np.float64, buffer, offset)
        offset += 2 * capacity * 8
        self.grids: list[Grid] = []
        for kind in sorted({_grid_of(limit) for limit in limits}):
            ring: Array = np.ndarray((2 * capacity, BINS), np.float64, buffer, offset)
            judged = tuple(i for i, limit in enumerate(limits) if _grid_of(limit) == kind)
            reach = max(limits[i].window_seconds for i in judged)
            self.grids.append(Grid(kind[0], ring, judged, reach))
            offset += ring.nbytes
        self.windows = [limit.window_seconds for limit in limits]
        self._written: dict[int, list[tuple[int, int]]] = {}
        self.torn = 0
        """Readings that were given up as they were, because rows changed all the time."""

    def open(
        self,
        row: int,
        idle_watts: float,
        rest_watts: float,
        rest_after_seconds: float,
        now: float,
        gpu_count: int = 1,
    ) -> None:
        """Start a row: what its engine drew before now is not the group's."""
        copies = slice(2 * row, 2 * row + 2)
        for grid in self.grids:
            grid.ring[copies] = 0.0
            current = math.floor(now / grid.bin_seconds)
            rest_seconds = (current + 1) * grid.bin_seconds - now
            grid.ring[copies, current % BINS] = rest_seconds * idle_watts
        self._ends[copies] = now
        self._written[row] = [(0, 0) for _ in self.grids]
        values = self.table[row]
        values["idle_watts"], values["rest_watts"] = idle_watts, rest_watts
        values["rest_after_seconds"] = rest_after_seconds
        values["gpu_count"] = gpu_count
        self.publish(row, EngineShare(idle_watts), now)
        self.versions[row] += 2
        values["used"] = 1

    def end_seconds(self, row: int) -> float:
        """Until when the row holds runs."""
        return float(self._ends[2 * row + int(self.versions[row]) % 2])

    def floor_watts(self, row: int, now_seconds: float) -> float:
        """What others expect the row's engine to draw after its runs."""
        values, end = self.table[row], self.end_seconds(row)
        if max(float(values["entered_seconds"]), end) + HEARD_SECONDS >= now_seconds:
            return float(values["floor_watts"])
        resting = now_seconds >= end + float(values["rest_after_seconds"])
        return float(values["rest_watts" if resting else "idle_watts"])

    def publish(self, row: int, share: EngineShare, now_seconds: float) -> None:
        """What the engine says of itself.

        Raises:
            LedgerError: a number is none.
        """
        _check(share)
        self._say(row, share, now_seconds)

    def _say(self, row: int, share: EngineShare, now_seconds: float) -> None:
        since, due = share.waiting_since_seconds, share.decodes_due_seconds
        self._said[row] = (
            share.floor_watts,
            share.decode_joules,
            share.decode_seconds,
            share.prefill_watts,
            share.burst_joules,
            math.nan if since is None else since,
            share.waiting_joules,
            math.nan if due is None else due,
            share.margin_ratio,
            now_seconds,
        )

    def commit(self, row: int, committed: Committed, share: EngineShare, now: float) -> None:
        """Replace what the row holds from `committed.final_seconds` on.

        Raises:
            LedgerError: a number is none; nothing was entered.
        """
        times, joules = committed.times, committed.joules
        end = float(times[-1])
        if not math.isfinite(end + float(joules[-1])):
            raise LedgerError(f"{joules[-1]} J until {end} s can't be entered")
        _check(share)
        version = int(self.versions[row])
        old, new = 2 * row + version % 2, 2 * row + (version + 1) % 2
        before = float(self._ends[old])
        if before < times[0]:
            since = joules[0] - float(self.table[row]["idle_watts"]) * (times[0] - before)
            times, joules = np.append(before, times), np.append(since, joules)
        entered = min(end, now + AHEAD_SECONDS)
        final = min(committed.final_seconds, before, entered)
        for index, grid in enumerate(self.grids):
            length = grid.bin_seconds
            last = math.floor(entered / length)
            first = max(math.floor(final / length), last - BINS + 1)
            edges = np.arange(first, last + 2) * length
            spent = np.interp(edges, times, joules)
            spent = spent[1:] - spent[:-1]
            # What is left of the last bin is the floor's.
            spent[-1] += max(0.0, float(edges[-1]) - end) * share.floor_watts
            unsaid = float(times[0] - edges[0]) / length
            if unsaid > 0.0:
                spent[0] += unsaid * grid.ring[old, first % BINS]
            # The other copy lacks what was written last.
            low, high = self._written[row][index]
            lacking = min(high, first) - low
            if lacking > 0:
                _put(grid.ring[new], low, bins_of(grid.ring, np.array([old]), low, lacking)[0])
            _put(grid.ring[new], first, spent)
            self._written[row][index] = first, last + 1
        self._ends[new] = entered
        self._say(row, share, now if entered == end else end)
        _fence()
        self.versions[row] = version + 1
        _fence()

    def retract(self, row: int) -> None:
        """Take back what was entered last."""
        self.versions[row] += 1

    def read(
        self, rows: npt.NDArray[np.intp] | None = None, retracting: int | None = None
    ) -> Reading:
        """What all engines of the group have entered, or those of some rows.

        Args:
            rows: by default those of all engines.
            retracting: of this row, what it held before what was entered last.
        """
        if rows is None:
            rows = self.table["used"].nonzero()[0]
        versions = self.versions.copy()
        copies = 2 * rows + (versions[rows] & 1)
        if retracting is not None:
            copies[rows == retracting] ^= 1
        table = self.table.take(rows)
        table["end_seconds"] = self._ends[copies]
        return Reading(versions, rows, copies, table)


def _check(share: EngineShare) -> None:
    """One engine's fault must not become that of all who sum."""
    total = share.floor_watts + share.decode_joules + share.decode_seconds
    total += share.prefill_watts + share.burst_joules + share.waiting_joules + share.margin_ratio
    if not math.isfinite(total):
        raise LedgerError(f"{share} can't be told to others")


def bins_of(ring: Array, copies: npt.NDArray[np.intp], first: int, count: int) -> Array:
    """[copies, count] bins from `first` on."""
    begin = first % BINS
    end = begin + count
    if end <= BINS:
        return ring[copies, begin:end]
    return np.concatenate((ring[copies, begin:], ring[copies, : end - BINS]), axis=1)


def _put(copy: Array, first: int, joules: Array) -> None:
    begin, count = first % BINS, len(joules)
    head = min(count, BINS - begin)
    copy[begin : begin + head] = joules[:head]
    copy[: count - head] = joules[head:]


def _fence() -> None:
    """What was written before is seen before what is written or read after.

    Processors may reorder a store and a later load, those of Arm also two stores; taking
    and freeing a lock twice keeps them apart.
    """
    for _ in range(2):
        with _FENCE:
            pass
