"""A real meter's recording through the replay reader and the sampler."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path

import pytest

from shaper.core.types import PowerState
from shaper.gpu.replay import ReplayReader
from shaper.gpu.sampler import Sampler

HERTZ_PER_MEGAHERTZ = 1e6
COLUMNS = (
    "read_seconds",
    "gpu_index",
    "temperature_celsius",
    "sm_clock_hertz",
    "instant_watts",
    "enforced_limit_watts",
)


def convert(source: Path, target: Path) -> int:
    """The published recording in this project's columns; returns its number of readings."""
    with source.open(newline="") as file:
        rows = list(csv.reader(file, skipinitialspace=True))
    start = datetime.strptime(rows[1][0], "%Y/%m/%d %H:%M:%S.%f")
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for moment, _, _, celsius, megahertz, _, instant in rows[1:]:
            at = datetime.strptime(moment, "%Y/%m/%d %H:%M:%S.%f") - start
            hertz = float(megahertz) * HERTZ_PER_MEGAHERTZ
            writer.writerow([at.total_seconds(), 0, celsius, hertz, instant, 400])
    return len(rows) - 1


@pytest.mark.needs_shared
def test_a_real_a100_is_believed_reading_by_reading(shared_data: Path, tmp_path: Path) -> None:
    """Idle, load and the edges between them: nothing a sound meter says is rejected."""
    path = tmp_path / "a100.csv"
    count = convert(shared_data / "meter" / "a100_transient" / "gpudata.csv", path)
    states: list[PowerState] = []
    sampler = Sampler(ReplayReader(path), on_state=states.append)
    for _ in range(count):
        sampler.tick()
    assert len(states) == count > 1000
    assert (sampler.rejected_readings, sampler.read_errors) == (0, 0)
    watts = [state.instant_watts or 0.0 for state in states]
    assert min(watts) < 70 < 150 < max(watts) < 450
    assert states[-1].sampled_seconds - states[0].sampled_seconds > 10
    sampler.tick()
    assert sampler.read_errors == 1, "the recording's end is a failed read"
