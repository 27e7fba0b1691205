"""Recordings: what is written is read again, and what is broken is named."""

from __future__ import annotations

import pytest

from shaper.core.types import ClockEventReasons, GpuSample, StepBatch
from shaper.errors import TraceError
from shaper.gpu.replay import ReplayReader
from shaper.recording.format import RecordedStep, RecordingWriter, finish_recordings, read_recording

STEPS = [
    RecordedStep(1.0, 1.008, StepBatch(8, 8, 8000)),
    RecordedStep(1.008, 1.05, StepBatch(8, 8, 8008, 1, 512, 512, 512 * 512, 512 * 512, 3)),
]
SAMPLES = [
    GpuSample(1.0 + 0.02 * i, 0, instant_watts=400.0 + i, energy_joules=5.0 * i,
              clock_event_reasons=ClockEventReasons.SW_POWER_CAP)
    for i in range(3)
]  # fmt: skip
META = {"gpu": "h200-sxm", "tensor_parallel": 1, "model_config": {"hidden_size": 4096}}


@pytest.fixture(params=[".csv", ".parquet"])
def path(request, tmp_path):
    """A finished recording."""
    file = tmp_path / f"run{request.param}"
    writer = RecordingWriter(file, META)
    writer.write(STEPS[:1], SAMPLES)
    writer.write(STEPS[1:])
    writer.close()
    writer.close()
    return file


def test_what_is_written_is_read(path):
    """Every field survives, in both formats."""
    recording = read_recording(path)
    assert recording.meta == META
    assert list(recording.steps) == STEPS
    assert list(recording.samples) == SAMPLES
    assert not path.with_suffix(".partial.csv").exists()


def test_a_recording_replays_as_a_gpu(path):
    """The samples in it are a `GpuReader`."""
    reader = ReplayReader(path)
    assert [reader.read()[0] for _ in SAMPLES] == SAMPLES


def test_a_killed_engine_leaves_what_it_wrote(tmp_path):
    """Without `close` all flushed rows are there, also for a Parquet recording."""
    writer = RecordingWriter(tmp_path / "run.parquet", META)
    writer.write(STEPS, SAMPLES)
    assert len(read_recording(tmp_path / "run.partial.csv").steps) == 2
    finish_recordings(tmp_path / "run.parquet")
    assert len(read_recording(tmp_path / "run.parquet").steps) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "run.parquet"]
    writer.close()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("step,2.0,1.0", "not after its start"),
        ("step,two,3.0", "'two', not a number"),
        ("stp,1.0,2.0", "kind is 'stp'"),
        ("sample,,", "read_seconds"),
        ("meta,,", "meta"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, says):
    """The message has the file, the row and the cell."""
    path = tmp_path / "run.csv"
    writer = RecordingWriter(path, META)
    writer.write(STEPS)
    writer.close()
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TraceError, match="row 5") as caught:
        read_recording(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["missing.csv", "missing.parquet", "other.csv", "other.parquet"])
def test_what_is_no_recording_is_refused(tmp_path, name):
    """A missing and a foreign file each say so."""
    if name.startswith("other"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(TraceError, match=name):
        read_recording(tmp_path / name)


def test_another_ending_is_refused(tmp_path):
    """The format follows from the name."""
    with pytest.raises(TraceError, match=r"\.csv or \.parquet"):
        RecordingWriter(tmp_path / "run.txt", META)
    with pytest.raises(TraceError, match="can't be written"):
        RecordingWriter(tmp_path / "no" / "run.csv", META)
