"""The GPUs of one emulated engine: a serial timeline of steps with power and heat.

Steps run one after the other: `start = max(now, free_at)`. What a step takes and
draws is the step model's prediction at the clock and temperature of the moment; the
clock controller acts inside a step, so a long one may speed up or slow down under way.
Between steps a GPU draws its gap power, and after a while that of a mere context.

All GPUs of the engine do the same work at the same clock; their meters differ. There
is no clock in here: times come in, and must not run backwards by more than threads do.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from shaper.core.model.predictor import Predictor
from shaper.core.model.profile import GpuProfile
from shaper.core.types import (
    ClockEventReasons,
    GpuIdentity,
    GpuSample,
    StepBatch,
)
from shaper.emulator.clocks import ClockController, check_power_cap
from shaper.emulator.heat import HeatModel
from shaper.emulator.meter import Meter, PowerHistory
from shaper.errors import ConfigError, GpuLostError

_THERMAL = ClockEventReasons.SW_THERMAL_SLOWDOWN
_BRAKE = ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN
_MARKS_KEPT = 2048
_LEAKAGE_STEP_CELSIUS = 1.0  # a change below it moves the power by less than 0.1%


class GpuPredictor(Predictor, Protocol):
    """What silicon asks of a step model."""

    @property
    def gpu_count(self) -> int:
        """GPUs whose joules a prediction counts."""
        ...


class StepRun(NamedTuple):
    """When a launched step runs, and the true energy it takes, all GPUs together."""

    start_seconds: float
    end_seconds: float
    joules: float

    @property
    def seconds(self) -> float:
        """How long it runs."""
        return self.end_seconds - self.start_seconds


class _Mark(NamedTuple):
    """The state over one stretch of constant power."""

    start_seconds: float
    end_seconds: float
    clock_hertz: float
    start_celsius: float
    end_celsius: float
    reasons: ClockEventReasons

    def celsius(self, at_seconds: float) -> float:
        """The die's temperature in between, on a straight line."""
        span = self.end_seconds - self.start_seconds
        share = (at_seconds - self.start_seconds) / span if span > 0 else 1.0
        share = min(1.0, max(0.0, share))
        return self.start_celsius + share * (self.end_celsius - self.start_celsius)


class EmulatedGpus:
    """All the GPUs of one engine. Thread-safe: one short lock around each call."""

    def __init__(
        self,
        profile: GpuProfile,
        model: GpuPredictor,
        *,
        gpu_count: int | None = None,
        start_seconds: float,
        seed: int = 0,
        power_cap_watts: float | None = None,
        ambient_celsius: float | None = None,
        step_noise_ratio: float = 0.0,
        exact_meter: bool = False,
    ) -> None:
        """Idle GPUs in thermal balance.

        Args:
            profile: the kind of GPU.
            model: predicts a step at a clock and a temperature.
            gpu_count: by default, and at most, that of the model.
            start_seconds: where the timeline begins.
            seed: of meter errors and step noise.
            power_cap_watts: enforced limit of each GPU; by default the profile's.
            ambient_celsius: by default the profile's.
            step_noise_ratio: standard deviation of a step's relative duration.
            exact_meter: meters without gain error.

        Raises:
            ConfigError: the cap is below the profile's smallest, or the count is not
                the model's.
        """
        count = model.gpu_count if gpu_count is None else gpu_count
        if count != model.gpu_count:
            raise ConfigError(f"gpu_count is {count}, but the model predicts {model.gpu_count}")
        limit = profile.power.limit_watts if power_cap_watts is None else power_cap_watts
        check_power_cap(profile, limit)
        idle = profile.power.context_watts
        self.profile = profile
        self.gpu_count = count
        self._model = model
        self._lock = threading.Lock()
        self._clocks = ClockController(profile, start_seconds, limit, idle)
        self._heat = HeatModel(profile.heat, idle, ambient_celsius)
        self._meters = [
            Meter(profile.meter, seed * 1009 + index, exact=exact_meter) for index in range(count)
        ]
        self._history = PowerHistory(start_seconds, idle, self._meters[0].keep_seconds + 1.0)
        self._start_seconds = start_seconds
        self._cursor_seconds = start_seconds
        self._known_seconds = start_seconds
        self._busy_end_seconds = start_seconds - profile.power.gap_hold_seconds
        self._pending: deque[tuple[float, float, float]] = deque()
        self._marks: deque[_Mark] = deque(maxlen=_MARKS_KEPT)
        self._joules = 0.0
        self._reason_seconds: dict[ClockEventReasons, float] = {}
        self._noise_ratio = step_noise_ratio
        self._random = random.Random(seed)

    @property
    def identities(self) -> tuple[GpuIdentity, ...]:
        """What the driver would list."""
        name = self.profile.nvml_names[0] if self.profile.nvml_names else self.profile.name
        return tuple(
            GpuIdentity(index, name, f"GPU-emulated-{index}", self._clocks.limit_watts)
            for index in range(self.gpu_count)
        )

    @property
    def free_at_seconds(self) -> float:
        """When the last launched step ends."""
        return self._cursor_seconds

    @property
    def true_joules(self) -> float:
        """True energy up to the end of what is settled, all GPUs together."""
        return self._joules

    def launch(self, batch: StepBatch, now_seconds: float) -> StepRun:
        """Queues a step behind those already launched and settles its course.

        Raises:
            GpuLostError: the die is above its shutdown temperature.
        """
        with self._lock:
            self._idle_until(now_seconds)
            if self._heat.die_celsius >= self.profile.heat.shutdown_celsius:
                raise GpuLostError(
                    f"emulated GPU shut down at {self._heat.die_celsius:.0f} degrees Celsius"
                )
            start, joules = self._cursor_seconds, self._joules
            self._run(batch)
            self._busy_end_seconds = self._cursor_seconds
            return StepRun(start, self._cursor_seconds, self._joules - joules)

    def advance(self, now_seconds: float) -> None:
        """Settles idle time up to now. Does nothing while a step runs."""
        with self._lock:
            self._idle_until(now_seconds)

    def sample(self, now_seconds: float) -> tuple[GpuSample, ...]:
        """What NVML would say now, per GPU."""
        with self._lock:
            self._idle_until(now_seconds)
            mark = self._mark_at(now_seconds)
            return tuple(
                GpuSample(
                    read_seconds=now_seconds,
                    gpu_index=index,
                    instant_watts=meter.instant_watts(self._history, now_seconds),
                    average_watts=meter.average_watts(self._history, now_seconds),
                    energy_joules=meter.energy_joules(
                        self._history, now_seconds, self._start_seconds
                    ),
                    enforced_limit_watts=self._clocks.limit_watts,
                    sm_clock_hertz=mark.clock_hertz,
                    memory_clock_hertz=self.profile.clocks.memory_hertz,
                    temperature_celsius=float(round(mark.celsius(now_seconds))),
                    clock_event_reasons=mark.reasons,
                    thermal_throttle_seconds=self._held_seconds(_THERMAL),
                    brake_throttle_seconds=self._held_seconds(_BRAKE),
                )
                for index, meter in enumerate(self._meters)
            )

    def take_segments(self) -> npt.NDArray[np.float64]:
        """The true power since the last take, up to the latest time heard of.

        Returns:
            Shape (N, 3): start seconds, end seconds, watts of all GPUs together;
            contiguous, idle time included. A step still running is left for later.
        """
        with self._lock:
            rows = []
            while self._pending and self._pending[0][1] <= self._known_seconds:
                rows.append(self._pending.popleft())
        return np.array(rows, dtype=np.float64).reshape(-1, 3)

    def reason_seconds(self) -> dict[ClockEventReasons, float]:
        """How long each clock event reason has held, as NVML's counters would show."""
        with self._lock:
            held = {one: self._held_seconds(one) for one in ClockEventReasons if one}
        return {one: seconds for one, seconds in held.items() if seconds}

    def set_power_cap(self, watts: float) -> None:
        """Changes each GPU's enforced limit, from the next step on.

        Raises:
            ConfigError: it is below the profile's smallest or above its default.
        """
        check_power_cap(self.profile, watts)
        with self._lock:
            self._clocks.limit_watts = watts

    def set_power_brake(self, on: bool) -> None:
        """Pulls or lets go of the power brake, from the next step on."""
        with self._lock:
            self._clocks.set_brake(on)

    def set_clock_ceiling(
        self, hertz: float | None, reasons: ClockEventReasons = ClockEventReasons.NONE
    ) -> None:
        """Makes the clock sag to `hertz`, for `reasons` (none: a gray failure);
        None lets go."""
        with self._lock:
            self._clocks.inject_ceiling(hertz, reasons)

    def set_ambient(self, celsius: float) -> None:
        """Changes the inlet air's temperature."""
        with self._lock:
            self._heat.ambient_celsius = celsius

    def _run(self, batch: StepBatch) -> None:
        """Runs one step from the cursor on, tick by tick of the clock controller."""
        clocks = self._clocks
        left, clock, celsius, prediction = 1.0, 0.0, 0.0, None
        stretch = 1.0
        if self._noise_ratio:
            stretch = max(0.5, 1.0 + self._random.gauss(0.0, self._noise_ratio))
        while left > 0.0:
            warmed = abs(self._heat.die_celsius - celsius) > _LEAKAGE_STEP_CELSIUS
            if prediction is None or warmed or clock != clocks.clock_hertz:
                clock, celsius = clocks.clock_hertz, self._heat.die_celsius
                prediction = self._model.predict(
                    batch,
                    sm_clock_hertz=clock,
                    temperature_celsius=celsius,
                )
                whole = prediction.seconds * stretch
                watts = prediction.watts / self.gpu_count
                if whole <= 0.0:
                    return
            part = left * whole
            until_tick = max(0.0, clocks.next_tick_seconds - self._cursor_seconds)
            if part <= until_tick:
                left = 0.0
            else:
                part = until_tick
                left -= part / whole
            self._spend(part, watts)
            if left > 0.0 or self._cursor_seconds >= clocks.next_tick_seconds:
                clocks.tick(self._heat.die_celsius)

    def _idle_until(self, now_seconds: float) -> None:
        """Fills the time from the cursor to now with gap and then context power."""
        self._known_seconds = max(self._known_seconds, now_seconds)
        power = self.profile.power
        gap_end = self._busy_end_seconds + power.gap_hold_seconds
        if self._cursor_seconds < now_seconds and self._cursor_seconds < gap_end:
            self._idle(min(now_seconds, gap_end), power.gap_watts, ClockEventReasons.NONE)
        if self._cursor_seconds < now_seconds:
            self._clocks.rest()
            self._idle(now_seconds, power.context_watts, ClockEventReasons.GPU_IDLE)
            self._clocks.rest()

    def _idle(self, end_seconds: float, watts: float, reason: ClockEventReasons) -> None:
        """Power below any limit: the clock controller only recovers."""
        self._spend(end_seconds - self._cursor_seconds, watts, reason)
        self._cursor_seconds = end_seconds
        self._clocks.ticks_until(end_seconds, self._heat.die_celsius)

    def _spend(
        self, seconds: float, watts: float, reason: ClockEventReasons = ClockEventReasons.NONE
    ) -> None:
        """Lets every GPU draw `watts` for `seconds` from the cursor on."""
        if seconds <= 0.0:
            return
        begin = self._cursor_seconds
        end = begin + seconds
        total = watts * self.gpu_count
        before = self._heat.die_celsius
        self._heat.step(seconds, watts)
        self._clocks.observe(seconds, watts)
        reasons = self._clocks.reasons
        if reason:
            reasons |= reason
        self._pending.append((begin, end, total))
        self._history.append(end, watts)
        self._marks.append(
            _Mark(begin, end, self._clocks.clock_hertz, before, self._heat.die_celsius, reasons)
        )
        self._joules += total * seconds
        self._cursor_seconds = end
        if reasons:
            self._reason_seconds[reasons] = self._reason_seconds.get(reasons, 0.0) + seconds

    def _held_seconds(self, reason: ClockEventReasons) -> float:
        return sum(seconds for held, seconds in self._reason_seconds.items() if reason in held)

    def _mark_at(self, now_seconds: float) -> _Mark:
        """The state at a time: that of the first stretch that ends after it."""
        found: _Mark | None = None
        for mark in reversed(self._marks):
            if mark.end_seconds < now_seconds and found is not None:
                break
            found = mark
        if found is None:
            celsius = self._heat.die_celsius
            idle = ClockEventReasons.GPU_IDLE
            clock = self._clocks.clock_hertz
            return _Mark(now_seconds, now_seconds, clock, celsius, celsius, idle)
        return found
