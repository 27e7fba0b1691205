"""The file of true power."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.emulator.trace import PowerTrace, PowerTraceWriter, Stall, read_power_trace
from shaper.errors import TraceError

SEGMENTS = np.array([[1.0, 1.5, 100.0], [1.5, 2.0, 500.0], [2.0, 3.0, 200.0]])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Segments and stalls come back, in order, from several appends."""
    path = tmp_path / "power.bin"
    writer = PowerTraceWriter(path)
    writer.append(SEGMENTS[:1])
    writer.note_stall(1.2, 0.004)
    writer.append(SEGMENTS[1:])
    writer.append(np.empty((0, 3)))
    trace = read_power_trace(path)
    writer.close()
    writer.close()
    assert np.array_equal(trace.segments, SEGMENTS)
    assert trace.stalls == (Stall(1.2, 0.004),)
    assert (trace.start_seconds, trace.end_seconds) == (1.0, 3.0)


def test_a_half_written_record_is_left_out(tmp_path: Path) -> None:
    """A run that died in the middle of a write leaves a readable file."""
    path = tmp_path / "power.bin"
    writer = PowerTraceWriter(path)
    writer.append(SEGMENTS)
    writer.close()
    path.write_bytes(path.read_bytes()[:-10])
    assert np.array_equal(read_power_trace(path).segments, SEGMENTS[:2])


def test_energy_by_hand() -> None:
    """Areas below the steps, in part and in whole; nothing outside."""
    trace = PowerTrace(SEGMENTS)
    assert trace.joules == pytest.approx(500.0)
    assert trace.joules_between(1.25, 1.75) == pytest.approx(150.0)
    assert trace.joules_between(0.0, 10.0) == pytest.approx(500.0)
    assert trace.joules_between(-5.0, 0.5) == 0.0


@given(
    lengths=st.lists(st.floats(1e-5, 0.3), min_size=1, max_size=30),
    watts=st.lists(st.floats(0.0, 1000.0), min_size=30, max_size=30),
    step=st.floats(5e-4, 0.05),
)
def test_the_grid_keeps_the_energy(lengths: list[float], watts: list[float], step: float) -> None:
    """Whatever the segments and the step: the binned energy is the whole energy."""
    ends = 5.0 + np.cumsum(lengths)
    starts = np.concatenate([[5.0], ends[:-1]])
    trace = PowerTrace(np.column_stack([starts, ends, watts[: len(lengths)]]))
    begin, binned = trace.on_grid(step)
    widths = np.full(len(binned), step)
    widths[-1] = trace.end_seconds - (begin + step * (len(binned) - 1))
    assert (binned * widths).sum() == pytest.approx(trace.joules, rel=1e-6, abs=1e-6)


def test_a_hole_counts_as_no_power() -> None:
    """Time that no segment covers adds nothing."""
    trace = PowerTrace(np.array([[0.0, 1.0, 100.0], [2.0, 3.0, 100.0]]))
    assert trace.joules_between(0.5, 2.5) == pytest.approx(100.0)
    assert trace.on_grid(1.0)[1] == pytest.approx([100.0, 0.0, 100.0])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (np.empty((0, 3)), "at least one"),
        (np.array([[1.0, 0.5, 10.0]]), "segment 0 ends before"),
        (np.array([[0.0, 1.0, 10.0], [0.5, 2.0, 10.0]]), "segment 1 starts before"),
    ],
)
def test_segments_out_of_order_are_refused(segments: np.ndarray, message: str) -> None:
    """The message says which."""
    with pytest.raises(TraceError, match=message):
        PowerTrace(segments)


def test_another_file_is_refused(tmp_path: Path) -> None:
    """A file of another kind is named."""
    path = tmp_path / "other.bin"
    path.write_bytes(b"hello")
    with pytest.raises(TraceError, match=r"other\.bin is no power trace"):
        read_power_trace(path)
    writer = PowerTraceWriter(path)
    with pytest.raises(ValueError, match="not"):
        writer.append(np.zeros((2, 2)))
    writer.close()
    with pytest.raises(TraceError, match="at least one segment"):
        read_power_trace(path)
