"""Plays a recording into a fake GPU's values."""

from __future__ import annotations

import csv
from bisect import bisect_right
from pathlib import Path

# A path is from the root of the checkout, wherever a test runs.
_ROOT = Path(__file__).resolve().parents[2]
# Columns of a recording, the attribute that each one drives, and the vendor's units in one of ours.
_COLUMNS = {
    "instant_watts": ("instant_milliwatts", 1e3),
    "average_watts": ("average_milliwatts", 1e3),
    "energy_joules": ("energy_millijoules", 1e3),
    "enforced_limit_watts": ("limit_milliwatts", 1e3),
    "sm_clock_hertz": ("sm_megahertz", 1e-6),
    "memory_clock_hertz": ("memory_megahertz", 1e-6),
    "temperature_celsius": ("celsius", 1.0),
    "clock_event_reasons": ("reasons", 1.0),
    "brake_throttle_seconds": ("brake_nanoseconds", 1e9),
    "thermal_throttle_seconds": ("sw_thermal_nanoseconds", 1e9),
    "power_cap_throttle_seconds": ("power_cap_nanoseconds", 1e9),
}


class Player:
    """Plays a recording over and over; counters go on from round to round."""

    def __init__(self, path: str) -> None:
        with (_ROOT / path).open(newline="") as file:
            rows = list(csv.DictReader(file))
        rows = [row for row in rows if row["gpu_index"] == rows[0]["gpu_index"]]
        times = [float(row["read_seconds"]) for row in rows]
        self._times = [at - times[0] for at in times]
        self._length = self._times[-1] + (self._times[1] if len(rows) > 1 else 1.0)
        names = [name for name in _COLUMNS if name in rows[0]]
        self._absent = [_COLUMNS[name][0] for name in names if rows[0][name] == ""]
        self._names = [name for name in names if rows[0][name] != ""]
        self._rows = [[float(row[name]) for name in self._names] for row in rows]
        self._shown: tuple[float, int] | None = None

    def play(self, gpu: object, seconds: float) -> None:
        """Set the GPU's values to what they were at this time of the recording."""
        rounds, at = divmod(seconds, self._length)
        place = rounds, bisect_right(self._times, at) - 1
        if place == self._shown:
            return
        self._shown = place
        for attribute in self._absent:
            setattr(gpu, attribute, None)
        first, last = self._rows[0], self._rows[-1]
        for column, name in enumerate(self._names):
            attribute, factor = _COLUMNS[name]
            value = self._rows[place[1]][column]
            if name.endswith(("_joules", "_throttle_seconds")):
                value += rounds * (last[column] - first[column])
            setattr(gpu, attribute, round(value * factor))
