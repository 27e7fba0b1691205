"""A driver's call that does not return: said once, shown, supervised, and not waited for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from shaper.gpu.nvml import NvmlReader
from shaper.gpu.sampler import Sampler, SensorReport
from tests.gpu.fake_faults import Fault
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

# No test waits so long: only a failure takes it.
PATIENCE_SECONDS = 60.0


class Running:
    """A sampler's threads over a fake driver, in real time."""

    def __init__(self) -> None:
        self.fake = FakeNvml([FakeGpu("GPU-a", counts=True)])
        self.sampler = Sampler(
            NvmlReader([0], library=self.fake), interval_seconds=0.001, on_tick=self.on_tick
        )
        self.ticks: list[tuple[float, str]] = []
        self.reports: list[SensorReport] = []
        self._inside = threading.Lock()
        self._moved = threading.Condition()

    def on_tick(self, now_seconds: float) -> None:
        assert self._inside.acquire(blocking=False), "two ticks at once"
        self.ticks.append((now_seconds, threading.current_thread().name))
        self.reports.append(self.sampler.report(now_seconds))
        self._inside.release()
        with self._moved:
            self._moved.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._moved:
            assert self._moved.wait_for(condition, PATIENCE_SECONDS)

    def hang(self) -> None:
        self.fake.released.clear()
        self.fake.faults = [Fault("hang", "nvmlDeviceGetFieldValues")]
        assert self.fake.hanging.wait(PATIENCE_SECONDS)

    def release(self) -> None:
        self.fake.faults = []
        self.fake.released.set()


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running()
    found.sampler.start()
    found.wait(lambda: found.sampler.latest is not None)
    yield found
    found.release()
    found.sampler.stop()


def test_it_is_said_once_which_call_hangs_and_ticks_go_on(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """From the watching thread, one at a time, in the order of time, with the state as it was."""
    with caplog.at_level(logging.WARNING):
        running.hang()
        before = running.sampler.latest
        running.wait(lambda: running.reports[-1].hanging_seconds > 0)
        count = len(running.ticks)
        running.wait(lambda: len(running.ticks) > count + 50)
        report = running.reports[-1]
    assert report.hanging_call == "nvmlDeviceGetFieldValues on GPU 0 (NVIDIA H200)"
    assert running.ticks[-1][1] == "shaper-sampler-watch"
    assert running.sampler.latest is before
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "nvmlDeviceGetFieldValues on GPU 0" in said[0]


def test_when_the_call_returns_the_sampler_takes_the_ticks_back(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """And time does not go backwards between the two threads."""
    running.hang()
    running.wait(lambda: running.reports[-1].hanging_seconds > 0)
    before = running.sampler.latest
    running.release()
    running.wait(lambda: running.sampler.latest is not before)
    running.wait(lambda: running.ticks[-1][1] == "shaper-sampler")
    assert (running.reports[-1].hanging_call, running.reports[-1].hanging_seconds) == ("", 0.0)
    times = [seconds for seconds, _ in running.ticks]
    assert times == sorted(times)


def test_a_call_that_hangs_holds_up_no_shutdown(running: Running) -> None:
    """The thread is left behind; when its call returns, it publishes nothing any more."""
    running.hang()
    running.wait(lambda: running.reports[-1].hanging_seconds > 0)
    left = running.sampler._thread
    running.sampler.stop()
    assert left is not None
    assert left.is_alive()
    before, count = running.sampler.latest, len(running.ticks)
    running.release()
    left.join(PATIENCE_SECONDS)
    assert not left.is_alive()
    assert running.sampler.latest is before
    assert len(running.ticks) == count
    assert running.fake.open_count == 0, "the driver is let go in the end"
