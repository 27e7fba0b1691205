"""The rows of a group: what each engine has committed, on a grid that all of them read.

Law. Power over time is kept as joules in bins of fixed length, aligned to the monotonic
clock: bin `b` is `[b, b + 1) * bin_seconds`, at place `b % BINS` of a ring. A row is
written by its own engine only, so that an engine which dies in the middle leaves no sum
wrong but its own. A row's bins are valid up to its `end_seconds`; after that the engine is
taken to draw idle power until now and its floor from now on, for as long as it has been
heard of lately, and idle power else.

Windows up to `FINE_LONGEST_SECONDS` are judged on bins of 1 ms, longer ones on 32 ms.
Within a bin power is taken as even: that moves at most a bin's joules of one engine by
half a bin, 0.25% of a window of 100 ms for one engine that goes from idle to its peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shaper.core.curve import Array
from shaper.core.group import Committed, EngineShare
from shaper.core.room import MOST_FLOOR_RATIO, WindowPart
from shaper.core.types import PowerLimit

BINS = 4096
FINE_LONGEST_SECONDS = 1.0
# What an engine last said of itself counts for so long after its last run: it asks every
# millisecond while it has work.
HEARD_SECONDS = 0.05

ROW = np.dtype(
    [
        ("used", np.uint64),
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
        ("decodes_due_seconds", np.float64),
    ]
)
"""`waiting_since_seconds` and `decodes_due_seconds` are NaN where there is nothing of it."""


@dataclass(frozen=True, slots=True)
class _Grid:
    """One resolution."""

    bin_seconds: float
    ring: npt.NDArray[np.float64]
    """[rows, BINS] joules."""


def table_bytes(capacity: int) -> int:
    """The size of a buffer for this many rows."""
    return capacity * (ROW.itemsize + 2 * BINS * 8)


class Rows:
    """All rows, over a buffer that processes share or one of this process.

    Args:
        buffer: `table_bytes(capacity)` bytes, zeros at first.
        capacity: how many engines there may be.
    """

    def __init__(self, buffer: memoryview | bytearray, capacity: int) -> None:
        self.table: npt.NDArray[np.void] = np.ndarray((capacity,), ROW, buffer)
        offset, size = capacity * ROW.itemsize, capacity * BINS * 8
        shape = (capacity, BINS)
        fine: Array = np.ndarray(shape, np.float64, buffer, offset)
        coarse: Array = np.ndarray(shape, np.float64, buffer, offset + size)
        self._grids = (_Grid(0.001, fine), _Grid(0.032, coarse))

    def open(
        self, row: int, idle_watts: float, rest_watts: float, rest_after_seconds: float, now: float
    ) -> None:
        """Start a row: idle until now."""
        for grid in self._grids:
            grid.ring[row] = 0.0
        values = self.table[row]
        values["end_seconds"] = values["entered_seconds"] = now
        values["idle_watts"], values["rest_watts"] = idle_watts, rest_watts
        values["rest_after_seconds"] = rest_after_seconds
        self.tell(row, EngineShare(rest_watts), now)
        values["used"] = 1

    def tell(self, row: int, share: EngineShare, now_seconds: float) -> None:
        """What the engine says of itself."""
        values = self.table[row]
        values["floor_watts"] = share.floor_watts
        values["decode_joules"] = share.decode_joules
        values["decode_seconds"] = share.decode_seconds
        values["prefill_watts"] = share.prefill_watts
        values["burst_joules"] = share.burst_joules
        since = share.waiting_since_seconds
        values["waiting_since_seconds"] = math.nan if since is None else since
        due = share.decodes_due_seconds
        values["decodes_due_seconds"] = math.nan if due is None else due
        values["entered_seconds"] = now_seconds

    def enter(self, row: int, committed: Committed, share: EngineShare, now: float) -> None:
        """Replace what the row holds from `committed.final_seconds` on."""
        times, joules = committed.times, committed.joules
        end = float(times[-1])
        for grid in self._grids:
            length = grid.bin_seconds
            last = math.floor(end / length)
            first = max(math.floor(committed.final_seconds / length), last - BINS // 2)
            edges = np.arange(first, last + 2) * length
            spent = np.diff(np.interp(edges, times, joules))
            # What is left of the last bin is the floor's.
            spent[-1] += (edges[-1] - end) * share.floor_watts
            grid.ring[row, np.arange(first, last + 1) % BINS] = spent
        self.table[row]["end_seconds"] = end
        self.tell(row, share, now)

    def part(
        self,
        limit: PowerLimit,
        own: int,
        start_seconds: float,
        now_seconds: float,
        floor_watts: float,
        kept_ratio: float,
    ) -> WindowPart:
        """What a limit leaves for a step of row `own` that starts at `start_seconds`."""
        window = limit.window_seconds
        grid = self._grids[0 if window <= FINE_LONGEST_SECONDS else 1]
        length = grid.bin_seconds
        first = math.floor((start_seconds - window) / length)
        last = math.ceil((start_seconds + window) / length)
        bins = np.arange(first, last)
        rows = np.flatnonzero(self.table["used"])
        allowed = limit.watts * kept_ratio
        spent = self._spent(grid, rows, bins, own, start_seconds, now_seconds, allowed)
        edges = np.arange(first, last + 1) * length
        total = np.concatenate(([0.0], np.cumsum(spent)))
        inside = edges[(edges > start_seconds) & (edges < start_seconds + window)] - start_seconds
        x = np.concatenate(([0.0], inside, [window]))
        # A corner within the first microsecond is no more than rounding, and divides by it.
        if len(x) > 2 and x[1] < 1e-6:
            x = np.delete(x, 1)
        used = np.interp(start_seconds + x, edges, total)
        used -= np.interp(start_seconds + x - window, edges, total)
        return WindowPart(window, allowed, floor_watts, x, allowed * window - used)

    def _spent(
        self,
        grid: _Grid,
        rows: npt.NDArray[np.intp],
        bins: npt.NDArray[np.int64],
        own: int,
        start_seconds: float,
        now_seconds: float,
        allowed_watts: float,
    ) -> Array:
        """[bins] joules of all rows; of row `own` only what lies before the step."""
        length = grid.bin_seconds
        table = self.table[rows]
        end = table["end_seconds"]
        times = bins * length
        joules = grid.ring[rows[:, None], bins % BINS]
        rest_from = end + table["rest_after_seconds"]
        after = np.where(
            times < rest_from[:, None], table["idle_watts"][:, None], table["rest_watts"][:, None]
        )
        heard = np.maximum(table["entered_seconds"], end) + HEARD_SECONDS >= now_seconds
        ahead = times >= now_seconds
        floors = np.where(heard, table["floor_watts"], table["rest_watts"])
        # Floors above the limit are taken as a part of it, as one engine's are.
        least = table["idle_watts"].sum()
        most = max(MOST_FLOOR_RATIO * allowed_watts - least, 0.0)
        above = np.maximum(floors - table["idle_watts"], 0.0)
        share = min(1.0, most / max(float(above.sum()), 1e-9))
        floors = np.minimum(floors, table["idle_watts"] + share * above)
        after = np.where(ahead & heard[:, None], floors[:, None], after)
        after[(rows == own)[:, None] & (times >= start_seconds)] = 0.0
        valid = bins <= np.floor(end / length)[:, None]
        total: Array = np.where(valid, joules, after * length).sum(axis=0)
        return total
