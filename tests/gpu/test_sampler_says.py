"""What the log says of a sensor that comes and goes: enough, and not more."""

from __future__ import annotations

import logging

import pytest

from shaper.core.types import GpuIdentity, GpuSample
from shaper.errors import GpuLostError
from shaper.gpu.sampler import Sampler
from tests.gpu.clocks import HandClock

TICK_SECONDS = 0.02


class Flapping:
    """A GPU that is away for the first two of every four seconds."""

    gpus = (GpuIdentity(0, "flapping", "GPU-0"),)

    def __init__(self, clock: HandClock, slow_seconds: float = 0.0) -> None:
        self._clock, self._slow_seconds = clock, slow_seconds

    def read(self) -> tuple[GpuSample, ...]:
        if self._slow_seconds:
            self._clock.advance(self._slow_seconds)
        elif self._clock() % 4.0 < 2.0:
            raise GpuLostError("away")
        now = self._clock()
        return (GpuSample(now, 0, 300.0 + now % 7.0, energy_joules=303.0 * now),)

    def close(self) -> None:
        """Nothing is held."""


def said(reader: Flapping, clock: HandClock, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged in ten minutes of ticks."""
    sampler = Sampler(reader, clock)
    with caplog.at_level(logging.WARNING):
        while clock() < 600.0:
            sampler.tick()
            clock.advance(TICK_SECONDS)
    return [record.message for record in caplog.records]


def test_a_gpu_that_flaps_is_said_to_be_back_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """150 times away in ten minutes: ten lines, with how long it was away, and one of why."""
    clock = HandClock(0.0)
    lines = said(Flapping(clock), clock, caplog)
    back = [line for line in lines if "the GPUs answer again, after 2." in line]
    assert 8 <= len(back) <= 10
    assert [line for line in lines if line not in back] == [lines[0]]
    assert "GpuLostError: away" in lines[0]


def test_reads_that_all_take_seconds_are_said_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A driver that is slow for hours does not fill the disk."""
    clock = HandClock(0.0)
    lines = said(Flapping(clock, slow_seconds=1.5), clock, caplog)
    assert 8 <= len(lines) <= 10
    assert "after 1.5 s" in lines[-1]
