"""True power over time, written while a run goes on and read back for its figures.

A file is a 16-byte header and records of three little-endian float64:

    (start_seconds, end_seconds, watts)   a segment of constant power
    (at_seconds, late_seconds, NaN)       the host stalled: a step ended this much late

Records are appended unbuffered, so a run that dies leaves what it had written; a
half-written last record is ignored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shaper.errors import TraceError

__all__ = ["PowerTrace", "PowerTraceWriter", "Stall", "read_power_trace"]

_HEADER = b"shaper-power-v1\n"
_RECORD = np.dtype("<f8")
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stall:
    """The host came late: the emulated step had ended `late_seconds` before."""

    at_seconds: float
    late_seconds: float


class PowerTraceWriter:
    """Appends segments to a file. Not thread-safe: one writer."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Creates or truncates the file.

        Raises:
            OSError: the file can't be written.
        """
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - closed in close()
        self._file.write(_HEADER)

    def append(self, segments: FloatArray) -> None:
        """Appends segments of shape (N, 3): start seconds, end seconds, watts."""
        rows = np.ascontiguousarray(segments, dtype=_RECORD)
        if rows.size:
            if rows.ndim != 2 or rows.shape[1] != 3:
                raise ValueError(f"segments have shape {rows.shape}, not (N, 3)")
            self._file.write(rows.tobytes())

    def note_stall(self, at_seconds: float, late_seconds: float) -> None:
        """Records that the host came `late_seconds` late at `at_seconds`."""
        row = np.array([[at_seconds, late_seconds, np.nan]], dtype=_RECORD)
        self._file.write(row.tobytes())

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()


class PowerTrace:
    """A recorded power curve, piecewise constant. Gaps count as zero power."""

    def __init__(self, segments: FloatArray, stalls: tuple[Stall, ...] = ()) -> None:
        """Takes segments of shape (N, 3), N at least 1, in order of time.

        Raises:
            TraceError: there are none, or they overlap or run backwards.
        """
        if segments.ndim != 2 or segments.shape[1] != 3 or not len(segments):
            raise TraceError("a power trace needs at least one segment")
        starts, ends = segments[:, 0], segments[:, 1]
        wrong = np.flatnonzero(ends < starts)
        if wrong.size:
            raise TraceError(f"power segment {wrong[0]} ends before it starts")
        wrong = np.flatnonzero(starts[1:] < ends[:-1] - 1e-6)
        if wrong.size:
            raise TraceError(f"power segment {wrong[0] + 1} starts before the last one ends")
        self.segments = segments
        self.stalls = stalls
        edges = np.empty(2 * len(segments))
        edges[0::2], edges[1::2] = starts, ends
        joules = np.empty(2 * len(segments))
        each = np.cumsum((ends - starts) * segments[:, 2])
        joules[1::2] = each
        joules[0::2] = np.concatenate([[0.0], each[:-1]])
        self._edges, self._joules = np.maximum.accumulate(edges), joules

    @property
    def start_seconds(self) -> float:
        """Where the first segment starts."""
        return float(self.segments[0, 0])

    @property
    def end_seconds(self) -> float:
        """Where the last segment ends."""
        return float(self.segments[-1, 1])

    @property
    def joules(self) -> float:
        """All the energy."""
        return float(self._joules[-1])

    def joules_between(self, from_seconds: float, to_seconds: float) -> float:
        """Energy between two times; outside the trace there is none."""
        at = np.interp([from_seconds, to_seconds], self._edges, self._joules)
        return float(at[1] - at[0])

    def joules_until(self, times: FloatArray) -> FloatArray:
        """[n] energy from the trace's start until each of [n] times."""
        return np.interp(times, self._edges, self._joules)

    def on_grid(self, step_seconds: float = 0.001) -> tuple[float, FloatArray]:
        """Mean watts of each grid step, so that energy is exact.

        Returns:
            The time of the first step's start, and the watts of each. The last step
            may reach beyond the trace's end; its mean is over the part inside.
        """
        if step_seconds <= 0:
            raise ValueError(f"step_seconds is {step_seconds}, not above 0")
        begin, end = self.start_seconds, self.end_seconds
        count = max(1, int(np.ceil((end - begin) / step_seconds - 1e-9)))
        edges = begin + np.arange(count + 1) * step_seconds
        energy = np.diff(np.interp(edges, self._edges, self._joules))
        widths = np.full(count, step_seconds)
        widths[-1] = max(min(step_seconds, end - edges[-2]), 1e-12)
        return begin, energy / widths


def read_power_trace(path: str | os.PathLike[str]) -> PowerTrace:
    """Reads a file that `PowerTraceWriter` wrote, a half-written end left out.

    Raises:
        TraceError: it is no such file, or holds no segment, or they are out of order.
    """
    raw = Path(path).read_bytes()
    if not raw.startswith(_HEADER):
        raise TraceError(f"{path} is no power trace of this project")
    body = raw[len(_HEADER) :]
    whole = len(body) // (3 * _RECORD.itemsize) * 3
    rows = np.frombuffer(body, dtype=_RECORD, count=whole).reshape(-1, 3)
    is_stall = np.isnan(rows[:, 2])
    stalls = tuple(Stall(float(row[0]), float(row[1])) for row in rows[is_stall])
    try:
        return PowerTrace(np.array(rows[~is_stall]), stalls)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
