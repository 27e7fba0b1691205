"""Recordings come back as they were taken, and broken ones say where."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from shaper.core.types import ClockEventReasons
from shaper.errors import GpuLostError, TraceError
from shaper.gpu.replay import ReplayReader
from tests.gpu.clocks import HandClock

TWO_GPUS = """\
read_seconds,gpu_index,instant_watts,energy_joules,clock_event_reasons,enforced_limit_watts,note
10.00,4,500.5,1000,4,700,a
10.00,5,300,2000,0,700,b
10.02,4,,1010,36,700,c
10.02,5,nan,2006,0,700,d
10.10,4,480,1050,0,700,e
10.10,5,310,2030,0,700,f
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.csv"
    path.write_text(text)
    return path


def test_readings_in_order_with_what_was_not_reported_missing(tmp_path: Path) -> None:
    """An empty cell is None, a recorded NaN stays NaN, other columns are ignored."""
    reader = ReplayReader(write(tmp_path, TWO_GPUS))
    assert [(gpu.index, gpu.enforced_limit_watts) for gpu in reader.gpus] == [(4, 700), (5, 700)]
    first, second, third = reader.read(), reader.read(), reader.read()
    assert (first[0].read_seconds, first[0].instant_watts) == (10.0, 500.5)
    assert first[0].clock_event_reasons is ClockEventReasons.SW_POWER_CAP
    assert second[0].instant_watts is None
    assert second[1].instant_watts is not None
    assert math.isnan(second[1].instant_watts)
    assert third[1].energy_joules == 2030
    assert third[1].average_watts is None


def test_a_parquet_file_gives_the_same(tmp_path: Path) -> None:
    """Both formats carry the same columns."""
    path = tmp_path / "run.parquet"
    columns = {"read_seconds": [1.0, 2.0], "gpu_index": [0, 0], "instant_watts": [250.0, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    reader = ReplayReader(path)
    assert [reader.read()[0].instant_watts for _ in range(2)] == [250.0, None]


def test_the_end_is_a_lost_gpu(tmp_path: Path) -> None:
    """A recording that ran out does not repeat its last reading for ever."""
    reader = ReplayReader(write(tmp_path, TWO_GPUS))
    for _ in range(3):
        reader.read()
    for _ in range(2):
        with pytest.raises(GpuLostError, match=r"run\.csv has ended"):
            reader.read()


def test_a_clock_paces_it_and_stamps_it(tmp_path: Path) -> None:
    """With a clock the reading that is due is returned, at the clock's time."""
    clock = HandClock(500.0)
    reader = ReplayReader(write(tmp_path, TWO_GPUS), clock)
    seen = []
    for seconds in (0.0, 0.019, 0.002, 0.05, 0.04):
        clock.advance(seconds)
        sample = reader.read()[0]
        assert sample.read_seconds == clock.now_seconds
        seen.append(sample.energy_joules)
    assert seen == [1000, 1000, 1010, 1010, 1050]
    clock.advance(0.08)
    with pytest.raises(GpuLostError):
        reader.read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column read_seconds and no column gpu_index"),
        ("read_seconds,gpu_index\n", "has no rows"),
        ("read_seconds,watts\n1,2\n", "no column gpu_index"),
        ("read_seconds,gpu_index\n1,0\nx,0\n", "row 3: read_seconds is 'x'"),
        ("read_seconds,gpu_index\n1,\n", "row 2: gpu_index is empty"),
        ("read_seconds,gpu_index\n1,0\n1,1\n2,1\n2,0\n", "reading 2: expected one row for each"),
        ("read_seconds,gpu_index\n1,0\n1,1\n2,0\n", "reading 2: expected one row for each"),
        ("read_seconds,gpu_index\n2,0\n1,0\n", "reading 2: its time goes backwards"),
    ],
)
def test_a_broken_recording_says_where(tmp_path: Path, text: str, message: str) -> None:
    """The message names the file and the row."""
    with pytest.raises(TraceError, match=message):
        ReplayReader(write(tmp_path, text))


@pytest.mark.parametrize("name", ["none.csv", "none.parquet"])
def test_a_missing_recording_is_a_trace_error(tmp_path: Path, name: str) -> None:
    """The path that was asked for is in the message."""
    with pytest.raises(TraceError, match=name):
        ReplayReader(tmp_path / name)


def test_a_file_that_is_no_parquet_is_a_trace_error(tmp_path: Path) -> None:
    """The reader's library errors do not leak."""
    path = tmp_path / "run.parquet"
    path.write_text("not parquet")
    with pytest.raises(TraceError, match="cannot be read"):
        ReplayReader(path)
