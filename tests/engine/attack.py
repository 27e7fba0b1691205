"""What goes wrong around a shaper, on command: sensors that lie, and seams that raise."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shaper.core.supervise.admission import Admission, AdmissionInput
from shaper.core.supervise.status import Admissibility, AdmissionState
from shaper.core.types import GpuIdentity, GpuSample, PowerState
from shaper.errors import GpuLostError
from shaper.gpu.reader import GpuReader

SENSOR_FAULTS = ("lost", "stuck", "nan", "negative", "x1000", "x0.001", "reset", "one_lost")
"""What a reader can do to its readings."""

SEAMS = (
    "shaper.core.controller:Controller.observe",
    "shaper.core.controller:Controller.plan",
    "shaper.core.controller:Controller.launched",
    "shaper.core.controller:Controller.finished",
    "shaper.core.controller:Controller.set_budget",
    "shaper.core.policy.windowed:WindowedPlanner.plan",
    "shaper.core.guard:Guard.check",
    "shaper.core.guard:Guard.launched",
    "shaper.core.ledger.ledger:Ledger.ask",
    "shaper.core.ledger.ledger:Ledger.spend",
    "shaper.core.learn.estimator:Estimator.correct",
    "shaper.core.learn.estimator:Estimator.observe_power",
    "shaper.engine.levers:Levers.apply",
    "shaper.engine.runtime:engine_load",
    "shaper.engine.runtime:launched_batch",
    "shaper.ipc.engine_record:SchedulerCounters.count",
    "shaper.engine.deferral:Deferral._arrived",
    "shaper.engine.deferral:Deferral._follow",
    "tests.engine.harness:RecordingLog.add",
    "tests.engine.harness:RecordingLog.record",
)
"""Everything of the shaper that runs where steps are scheduled, by its parts' edges."""


class Sabotaged(Exception):  # noqa: N818
    """Raised by a seam that was told to."""


class Sabotage:
    """Makes seams raise. One armed seam at a time raises `times` times, then works again."""

    def __init__(self) -> None:
        self.raised = 0
        self._left: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    def arm(self, seam: str, times: int = 1) -> None:
        """The next `times` calls of this seam raise."""
        if seam not in self._left:
            self._install(seam)
        self._left[seam] = times

    @property
    def armed(self) -> bool:
        """Whether some seam would raise."""
        return any(self._left.values())

    def disarm(self) -> None:
        """All seams work."""
        self._left = dict.fromkeys(self._left, 0)

    def remove(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()
        self._left.clear()

    def _install(self, seam: str) -> None:
        module_name, _, path = seam.partition(":")
        owner: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        inner = getattr(owner, name)

        def sabotaged(*args: Any, **kwargs: Any) -> Any:
            if self._left.get(seam, 0) > 0:
                self._left[seam] -= 1
                self.raised += 1
                raise Sabotaged(seam)
            return inner(*args, **kwargs)

        setattr(owner, name, sabotaged)
        self._undo.append(lambda: setattr(owner, name, inner))


@contextmanager
def sabotage(seam: str, times: int = 1) -> Iterator[Sabotage]:
    """One seam raises, until the end of the block at most."""
    saboteur = Sabotage()
    saboteur.arm(seam, times)
    try:
        yield saboteur
    finally:
        saboteur.remove()


class FaultyReader:
    """Meters that lie while `fault` is set. `gpu_index` None: all of them."""

    def __init__(self, inner: GpuReader) -> None:
        self.inner = inner
        self.fault: str | None = None
        self.gpu_index: int | None = None
        self._last: tuple[GpuSample, ...] = ()
        self._zero: dict[int, float] = {}

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        return self.inner.gpus

    def close(self) -> None:
        self.inner.close()

    def read(self) -> tuple[GpuSample, ...]:
        samples = self.inner.read()
        if self.fault == "lost" and self.gpu_index is None:
            raise GpuLostError("the GPU fell off the bus")
        if self.fault != "stuck" or not self._last:
            self._last = samples
        return tuple(
            self._bend(sample, last)
            if self.gpu_index in (None, sample.gpu_index)
            else self._since_reset(sample)
            for sample, last in zip(samples, self._last, strict=True)
        )

    def _bend(self, sample: GpuSample, last: GpuSample) -> GpuSample:
        fault = self.fault
        if fault == "stuck":
            return dataclasses.replace(last, read_seconds=sample.read_seconds)
        if fault in ("one_lost", "lost"):
            if fault == "one_lost" and sample.gpu_index != 0:
                return self._since_reset(sample)
            return GpuSample(read_seconds=sample.read_seconds, gpu_index=sample.gpu_index)
        if fault == "reset":
            self._zero.setdefault(sample.gpu_index, sample.energy_joules or 0.0)
        factor = {"nan": math.nan, "negative": -1.0, "x1000": 1e3, "x0.001": 1e-3}.get(fault or "")
        sample = self._since_reset(sample)
        return sample if factor is None else _scaled(sample, factor)

    def _since_reset(self, sample: GpuSample) -> GpuSample:
        zero = self._zero.get(sample.gpu_index)
        if zero is None or sample.energy_joules is None:
            return sample
        return dataclasses.replace(sample, energy_joules=sample.energy_joules - zero)


def _scaled(sample: GpuSample, factor: float) -> GpuSample:
    def times(value: float | None) -> float | None:
        return None if value is None else value * factor

    return dataclasses.replace(
        sample,
        instant_watts=times(sample.instant_watts),
        average_watts=times(sample.average_watts),
        energy_joules=times(sample.energy_joules),
        sm_clock_hertz=times(sample.sm_clock_hertz),
        temperature_celsius=times(sample.temperature_celsius),
    )


class StallingSampler:
    """A sampler whose thread hangs while `stalled`: what it published last stays."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.stalled = False
        self._latest: PowerState | None = None

    @property
    def latest(self) -> PowerState | None:
        if not self.stalled:
            self._latest = self.inner.latest
        return self._latest


class Mood(Admission):
    """An admission that says what it was told to."""

    def __init__(self) -> None:
        self.said = Admissibility()

    def say(self, state: AdmissionState, pressure_ratio: float) -> None:
        """What holds from the next tick on."""
        self.said = Admissibility(state, pressure_ratio, "told to", 1.0)

    def update(self, given: AdmissionInput, now_seconds: float) -> Admissibility:
        return self.said
