"""The engine's recorder: what goes wrong in it costs rows, and nothing else."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable

import pytest

from shaper.core.types import GpuSample, StepBatch
from shaper.engine import recorder as module
from shaper.engine.recorder import Recorder
from shaper.ipc.control_file import RecordOrder
from shaper.ipc.recording_state import RecordingPhase, RecordingState
from shaper.recording.format import RecordedStep, RecordingWriter, read_recording

STEP = RecordedStep(1.0, 1.01, StepBatch(decode_requests=1, decode_tokens=1))
SAMPLE = GpuSample(1.0, 0, instant_watts=300.0)


def order(sequence: int, file: str = "run.csv", seconds: float = 60.0) -> RecordOrder:
    until = time.monotonic() + seconds
    return RecordOrder(file=file, until_monotonic_seconds=until, sequence=sequence)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def follow(recorder: Recorder, asked: RecordOrder | None) -> None:
    recorder.follow(asked, time.monotonic())


@pytest.mark.parametrize("name", ["run.csv", "run.parquet"])
def test_it_records_from_the_order_to_its_end(tmp_path, name):
    """Nothing before, nothing after, and a file of the rank's own that is whole."""
    recorder = Recorder(tmp_path, 1, {"gpu": "h200-sxm"})
    recorder.add_step(STEP)
    recorder.add_samples((SAMPLE,))
    assert recorder.state == RecordingState()
    follow(recorder, order(5, name))
    wait(lambda: recorder.state.phase is RecordingPhase.RECORDING)
    for _ in range(3):
        recorder.add_step(STEP)
        recorder.add_samples((SAMPLE,))
    follow(recorder, None)
    wait(lambda: recorder.state.over)
    recorder.add_step(STEP)
    assert recorder.state.phase is RecordingPhase.ENDED
    assert (recorder.state.sequence, recorder.state.rows) == (5, 6)
    recording = read_recording(tmp_path / name.replace(".", ".rank1."))
    assert (recording.steps, recording.samples) == ((STEP,) * 3, (SAMPLE,) * 3)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_library_that_aborts_after_the_file_is_made_is_no_failure(tmp_path, monkeypatch):
    """What makes the Parquet is a process of its own, and may crash when it has done its work."""
    start_up = tmp_path / "start_up"
    start_up.mkdir()
    (start_up / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.abort)\n")
    monkeypatch.setenv("PYTHONPATH", str(start_up))
    recorder = Recorder(tmp_path, 0, {"gpu": "h200-sxm"})
    follow(recorder, order(5, "run.parquet"))
    wait(lambda: recorder.state.phase is RecordingPhase.RECORDING)
    recorder.add_step(STEP)
    follow(recorder, None)
    wait(lambda: recorder.state.over)
    assert recorder.state.phase is RecordingPhase.ENDED
    assert read_recording(tmp_path / "run.parquet").steps == (STEP,)


def test_its_time_and_its_bytes_end_it(tmp_path, monkeypatch):
    """Without anybody asking."""
    recorder = Recorder(tmp_path, 0, {})
    follow(recorder, order(1, "a.csv", 0.05))
    wait(lambda: recorder.state.phase is RecordingPhase.ENDED)
    monkeypatch.setattr(module, "MAX_BYTES", 2000)
    follow(recorder, order(2, "b.csv"))
    wait(lambda: recorder.state.sequence == 2 and recorder.state.phase is RecordingPhase.RECORDING)
    for _ in range(100):
        recorder.add_step(STEP)
    wait(lambda: recorder.state.phase is RecordingPhase.ENDED)
    monkeypatch.setattr(module, "LEAST_FREE_BYTES", 1 << 60)
    follow(recorder, order(3, "c.csv"))
    wait(lambda: recorder.state.sequence == 3 and recorder.state.over)
    assert recorder.state.error_number == errno.ENOSPC


def test_a_file_that_is_there_is_not_touched_also_by_an_engine_that_starts_anew(tmp_path):
    """The order still stands when the second engine sees it; it fails, and the rows stay."""
    first = Recorder(tmp_path, 0, {})
    asked = order(1)
    follow(first, asked)
    wait(lambda: first.state.phase is RecordingPhase.RECORDING)
    first.add_step(STEP)
    wait(lambda: first.state.rows == 1)
    before = (tmp_path / "run.csv").read_bytes()
    second = Recorder(tmp_path, 0, {})
    follow(second, asked)
    wait(lambda: second.state.over)
    assert second.state.error_number == errno.EEXIST
    assert (tmp_path / "run.csv").read_bytes() == before
    late = Recorder(tmp_path, 0, {})
    follow(late, order(2, "late.csv", -1.0))
    assert (late.state.sequence, late.state.phase) == (2, RecordingPhase.NONE)
    first.close()


def test_a_disk_that_fails_or_hangs_is_not_waited_for(tmp_path, monkeypatch):
    """Steps and readings pass in no time, the queue is bounded, and what is lost is counted."""
    hang = threading.Event()
    real = RecordingWriter.write

    def write(self, *args, **kwargs):
        hang.wait(30)
        real(self, *args, **kwargs)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(RecordingWriter, "write", write)
    monkeypatch.setattr(module, "_MAX_PENDING", 50)
    recorder = Recorder(tmp_path, 0, {})
    follow(recorder, order(1))
    wait(lambda: recorder.state.phase is RecordingPhase.RECORDING)
    for _ in range(500):
        recorder.add_step(STEP)
        recorder.add_samples((SAMPLE,))
    hang.set()
    wait(lambda: recorder.state.over)
    assert recorder.state.error_number == errno.ENOSPC
    assert recorder.state.dropped > 500
    follow(recorder, order(2, "next.csv"))
    wait(lambda: recorder.state.sequence == 2)
    recorder.close()


@pytest.mark.parametrize("broken", [ValueError("a mistake"), OSError(errno.EIO, "disk")])
def test_a_mistake_in_it_is_logged_and_ends_it(tmp_path, monkeypatch, caplog, broken):
    """The sampler's thread and the scheduler's hear nothing of it."""

    def fail(*args, **kwargs):
        raise broken

    # vLLM's set-up in this process may have given our loggers handlers of their own.
    monkeypatch.setattr(logging.getLogger("shaper"), "propagate", True)
    monkeypatch.setattr(module, "RecordingWriter", fail)
    recorder = Recorder(tmp_path, 0, {})
    follow(recorder, order(1))
    wait(lambda: recorder.state.over)
    assert recorder.state.error_number == errno.EIO
    recorder.add_step(STEP)
    assert "recording" in caplog.text
    monkeypatch.setattr(module, "_Job", fail)
    follow(recorder, order(2))
    assert "could not be started" in caplog.text


def test_an_engine_that_records_all_the_time_takes_no_order(tmp_path):
    """Its file goes on, and is whole at its close."""
    recorder = Recorder(tmp_path, 0, {}, str(tmp_path / "always.parquet"))
    recorder.start()
    recorder.add_step(STEP)
    follow(recorder, order(1))
    assert recorder.state.error_number == errno.EBUSY
    recorder.add_step(STEP)
    recorder.close()
    assert len(read_recording(tmp_path / "always.parquet").steps) == 2
    assert not (tmp_path / "run.csv").exists()
