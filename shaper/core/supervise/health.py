"""Gray failure: a GPU that is alive and gives less than its state should give.

Law: each cause has a level, an exponential mean of what is missing, over the time in
which it can be judged. Degraded when the level has been above `enter` for a hold time;
recovered when it has been below `leave` for a longer one.

    clock       1 - clock / highest clock, while busy; 0 where a power cap that the watts
                explain, heat, the brake or a setting holds the clock
    thermal     share of time in a thermal slowdown
    brake       share of time under a power brake or another hardware slowdown
    throughput  1 - reference / gain, while busy; the gain is measured over predicted step
                seconds at the measured clock, the reference what it was when all was well

A cause that nothing has confirmed for a minute, since the GPU had no work, is let go:
else a GPU that is avoided for being degraded would stay so for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shaper.core.model.profile import GpuProfile
from shaper.core.supervise.status import Cause, Degradation
from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample

_THERMAL = ClockEventReasons.SW_THERMAL_SLOWDOWN | ClockEventReasons.HW_THERMAL_SLOWDOWN
_BRAKE = ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN
_SETTING = (
    ClockEventReasons.APPLICATIONS_CLOCKS_SETTING
    | ClockEventReasons.SYNC_BOOST
    | ClockEventReasons.DISPLAY_CLOCK_SETTING
)

# A power cap moves the clock every 10 ms or so; two seconds hold many of its swings.
_LEVEL_SECONDS = 2.0
# A GPU that wakes raises its clocks within a few 100 ms.
_WAKE_SECONDS = 1.0
# The first steps compile, warm caches and fill the estimator's means.
_WARM_UP_SECONDS = 10.0
# The gain's own mean is some seconds long: a reference wants several of it.
_REFERENCE_SECONDS = 30.0
# Slow beside any fault that matters, quick beside a change of seasons in the traffic.
_REFERENCE_DRIFT_SECONDS = 600.0
# A profile may be this far off on a GPU that is well; beyond it the GPU is called slow.
_REFERENCE_RANGE = (0.7, 1.15)
# Bursts cap the clock while the mean is lower: a cap with this share of the limit as the
# highest reading of the last two seconds is the load's; near the limit even without the bit.
_CAPPED_RATIO, _AT_LIMIT_RATIO = 0.75, 0.9
# A swing of a power cap reaches its peak within this: a peak that is older is let go.
_PEAK_SECONDS = 2.0
# Longer than any pause of a busy engine; short enough for a router that probes again.
_UNSEEN_SECONDS = 60.0
# Counters are read once a second: what they add to the bits is at most this late.
_OWED_SECONDS = 1.5
# The driver rounds limits to a watt.
_LIMIT_CHANGE_RATIO = 0.01
# A limit that flaps is said at this pace.
_LIMIT_SAID_SECONDS = 10.0
# The sampler may stall; what happened meanwhile was not seen.
_MAX_TICK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _Threshold:
    enter: float
    leave: float
    hold_seconds: float
    recover_seconds: float = 5.0


_THRESHOLDS = {
    # Ten steps of 15 MHz: temperature alone moves a boost clock by a few.
    Cause.CLOCK: _Threshold(0.08, 0.04, 2.0),
    # One reading of heat is 20 ms, a level of 0.01; a tenth of the time is felt.
    Cause.THERMAL: _Threshold(0.1, 0.02, 1.0),
    Cause.BRAKE: _Threshold(0.1, 0.02, 0.5),
    # A mix of steps that the profile predicts unevenly moves the gain by a tenth.
    Cause.THROUGHPUT: _Threshold(1.0 - 1.0 / 1.2, 0.1, 3.0),
}


@dataclass(slots=True)
class _Fault:
    """One cause on one GPU. Times are judged time, but for `since` and `seen`."""

    level: float = 0.0
    turning_seconds: float = 0.0
    """How long the level has been beyond the threshold that would change `since`."""
    since_seconds: float | None = None
    seen_seconds: float = -math.inf

    def observe(self, missing: float, span: float, now: float, threshold: _Threshold) -> bool:
        """Enter what is missing over `span`; true if this changed whether it is degraded."""
        self.level += (1.0 - math.exp(-span / _LEVEL_SECONDS)) * (missing - self.level)
        self.seen_seconds = now
        healthy = self.since_seconds is None
        beyond = self.level > threshold.enter if healthy else self.level < threshold.leave
        self.turning_seconds = self.turning_seconds + span if beyond else 0.0
        hold = threshold.hold_seconds if healthy else threshold.recover_seconds
        if self.turning_seconds < hold:
            return False
        self.since_seconds = now if healthy else None
        self.turning_seconds = 0.0
        return True


@dataclass(slots=True)
class _Gpu:
    """What is remembered of one GPU."""

    read_seconds: float | None = None
    limit_watts: float | None = None
    said_limit_watts: float | None = None
    said_limit_seconds: float = -math.inf
    peak_watts: float = 0.0
    peak_seconds: float = -math.inf
    counters: dict[Cause, float] = field(default_factory=dict)
    owed_seconds: dict[Cause, float] = field(default_factory=dict)
    """Slowdown that a counter showed and no bit did; below 0 the other way round."""
    faults: dict[Cause, _Fault] = field(
        default_factory=lambda: {c: _Fault() for c in (Cause.CLOCK, Cause.THERMAL, Cause.BRAKE)}
    )


class Health:
    """Judges the GPUs of one engine.

    Args:
        profile: its highest clock and limit hold where a GPU doesn't tell its own.
        gpus: what the reader says of them.

    Stateful fields: one `_Gpu` each, the throughput's fault and reference, busy times.
    """

    def __init__(self, profile: GpuProfile, gpus: Sequence[GpuIdentity] = ()) -> None:
        self._limit_watts = profile.power.limit_watts
        self._highest_hertz = profile.clocks.sm_max_hertz
        self._own_hertz: Mapping[int, float] = {
            gpu.index: gpu.max_sm_clock_hertz for gpu in gpus if gpu.max_sm_clock_hertz
        }
        self._gpus: dict[int, _Gpu] = {}
        self._throughput = _Fault()
        self._reference = 1.0
        self._reference_seconds = 0.0
        self._now_seconds: float | None = None
        self._busy_since_seconds: float | None = None
        self._warm_seconds = 0.0

    def observe(
        self,
        now_seconds: float,
        samples: Sequence[GpuSample],
        busy: bool,
        seconds_gain_ratio: float,
    ) -> tuple[str, ...]:
        """Take one tick. Returns what changed, as lines for people.

        Args:
            now_seconds: of this tick.
            samples: the newest of each GPU; one that was seen before says nothing new.
            busy: the engine has work.
            seconds_gain_ratio: measured over predicted step seconds at the measured clock.
        """
        before, self._now_seconds = self._now_seconds, now_seconds
        span = 0.0 if before is None else min(now_seconds - before, _MAX_TICK_SECONDS)
        if not busy:
            self._busy_since_seconds = None
        elif self._busy_since_seconds is None:
            self._busy_since_seconds = now_seconds
        self._warm_seconds += span if busy else 0.0
        lines: list[str] = []
        for sample in samples:
            lines += self._judge(sample, now_seconds)
        if busy and self._warm_seconds > _WARM_UP_SECONDS and span > 0:
            lines += self._judge_gain(seconds_gain_ratio, span, now_seconds)
        lines += self._let_go(now_seconds)
        return tuple(lines)

    @property
    def degradations(self) -> tuple[Degradation, ...]:
        """What is degraded now, by GPU."""
        return tuple(
            Degradation(cause, min(1.0, max(0.0, fault.level)), fault.since_seconds, index)
            for index, cause, fault in self._faults()
            if fault.since_seconds is not None
        )

    def _faults(self) -> Iterator[tuple[int | None, Cause, _Fault]]:
        for index, gpu in self._gpus.items():
            for cause, fault in gpu.faults.items():
                yield index, cause, fault
        yield None, Cause.THROUGHPUT, self._throughput

    def _judge(self, sample: GpuSample, now: float) -> Iterator[str]:
        gpu = self._gpus.setdefault(sample.gpu_index, _Gpu())
        before = gpu.read_seconds
        if before is not None and sample.read_seconds <= before:
            return
        gpu.read_seconds = sample.read_seconds
        yield from _limit_line(gpu, sample)
        _note_peak(gpu, sample)
        span = 0.0 if before is None else min(sample.read_seconds - before, _MAX_TICK_SECONDS)
        if span <= 0:
            return
        reasons = sample.clock_event_reasons
        thermal = bool(reasons & _THERMAL)
        slowdown = ClockEventReasons.HW_SLOWDOWN in reasons and not thermal
        brake = slowdown or bool(reasons & _BRAKE)
        hot_counter, brake_counter = sample.thermal_throttle_seconds, sample.brake_throttle_seconds
        missing = {
            Cause.THERMAL: _share(gpu, Cause.THERMAL, hot_counter, span, thermal),
            Cause.BRAKE: _share(gpu, Cause.BRAKE, brake_counter, span, brake),
        }
        if ClockEventReasons.GPU_IDLE in reasons:
            return
        awake = self._busy_since_seconds is not None and (
            now - self._busy_since_seconds > _WAKE_SECONDS and self._warm_seconds > _WARM_UP_SECONDS
        )
        if awake and sample.sm_clock_hertz is not None and not (thermal or brake):
            missing[Cause.CLOCK] = self._missing_clock(gpu, sample, sample.sm_clock_hertz)
        for cause, ratio in missing.items():
            if gpu.faults[cause].observe(ratio, span, now, _THRESHOLDS[cause]):
                yield _line(cause, gpu.faults[cause], sample, self._highest(sample))

    def _highest(self, sample: GpuSample) -> float:
        return self._own_hertz.get(sample.gpu_index, self._highest_hertz)

    def _missing_clock(self, gpu: _Gpu, sample: GpuSample, clock_hertz: float) -> float:
        reasons = sample.clock_event_reasons
        share = gpu.peak_watts / (gpu.limit_watts or self._limit_watts)
        capped = ClockEventReasons.SW_POWER_CAP in reasons and (
            share > _CAPPED_RATIO or not gpu.peak_watts  # a meter that is lost refutes nothing
        )
        if capped or share > _AT_LIMIT_RATIO or reasons & _SETTING:
            return 0.0
        return max(0.0, 1.0 - clock_hertz / self._highest(sample))

    def _judge_gain(self, gain: float, span: float, now: float) -> Iterator[str]:
        if not (math.isfinite(gain) and gain > 0):
            return
        lowest, highest = _REFERENCE_RANGE
        missing = 1.0 - self._reference / gain
        if self._reference_seconds < _REFERENCE_SECONDS:
            self._reference_seconds += span
            weight = span / self._reference_seconds
        elif missing < _THRESHOLDS[Cause.THROUGHPUT].leave:
            weight = span / _REFERENCE_DRIFT_SECONDS
        else:
            weight = 0.0
        self._reference += weight * (min(max(gain, lowest), highest) - self._reference)
        if self._reference_seconds < _REFERENCE_SECONDS:
            return
        fault = self._throughput
        if fault.observe(missing, span, now, _THRESHOLDS[Cause.THROUGHPUT]):
            if fault.since_seconds is None:
                yield "recovered: steps take the time that the model says again"
            else:
                yield (
                    f"degraded: the engine gives {_percent(missing)} less than the model says at "
                    f"the measured clock (steps take {gain:.2f} times the profile's, "
                    f"{self._reference:.2f} when all was well)"
                )

    def _let_go(self, now: float) -> Iterator[str]:
        for index, cause, fault in self._faults():
            if fault.since_seconds is not None and now - fault.seen_seconds > _UNSEEN_SECONDS:
                fault.level = fault.turning_seconds = 0.0
                fault.since_seconds = None
                who = "the engine" if index is None else f"GPU {index}"
                yield (
                    f"no longer degraded for {cause.value}: {who} has had no work for "
                    f"{_UNSEEN_SECONDS:.0f} s that would show it"
                )


def _share(gpu: _Gpu, cause: Cause, counter: float | None, span: float, bit: bool) -> float:
    """Share of `span` under a slowdown: by the reason's bit, and by the GPU's own counter
    where it has one, which misses none but tells of it late."""
    owed = gpu.owed_seconds.get(cause, 0.0)
    if counter is not None:
        rise = counter - gpu.counters.get(cause, counter)
        gpu.counters[cause] = counter
        # More than the time between two reads of it is a jump, not a slowdown.
        owed += rise if 0.0 < rise <= _OWED_SECONDS else 0.0
    share = 1.0 if bit else min(1.0, max(0.0, owed / span))
    gpu.owed_seconds[cause] = min(max(owed - share * span, -_OWED_SECONDS), _OWED_SECONDS)
    return share


def _note_peak(gpu: _Gpu, sample: GpuSample) -> None:
    watts = max(sample.instant_watts or 0.0, sample.average_watts or 0.0)
    if watts >= gpu.peak_watts or sample.read_seconds - gpu.peak_seconds > _PEAK_SECONDS:
        gpu.peak_watts, gpu.peak_seconds = watts, sample.read_seconds


def _limit_line(gpu: _Gpu, sample: GpuSample) -> Iterator[str]:
    """A limit that keeps changing is said now and then, from what was said to what holds."""
    limit, said = sample.enforced_limit_watts, gpu.said_limit_watts
    if limit is None:
        return
    gpu.limit_watts = limit
    if said is None:
        gpu.said_limit_watts = limit
        return
    if abs(limit - said) <= _LIMIT_CHANGE_RATIO * said:
        return
    if sample.read_seconds - gpu.said_limit_seconds < _LIMIT_SAID_SECONDS:
        return
    gpu.said_limit_watts, gpu.said_limit_seconds = limit, sample.read_seconds
    how = "fell" if limit < said else "rose"
    yield (
        f"GPU {sample.gpu_index}: its enforced power limit {how} from {said:.0f} to "
        f"{limit:.0f} W; the driver or an operator changed it"
    )


def _line(cause: Cause, fault: _Fault, sample: GpuSample, highest_hertz: float) -> str:
    who = f"GPU {sample.gpu_index}"
    clock = sample.sm_clock_hertz
    at = "" if clock is None else f" ({clock / 1e9:.2f} of {highest_hertz / 1e9:.2f} GHz)"
    heat = "" if sample.temperature_celsius is None else f" at {sample.temperature_celsius:.0f} °C"
    if fault.since_seconds is None:
        return {
            Cause.CLOCK: f"recovered: {who}'s clock is what its state explains again{at}",
            Cause.THERMAL: f"recovered: {who} no longer slows down for heat{heat}",
            Cause.BRAKE: f"recovered: {who}'s power brake is off",
        }[cause]
    level = _percent(fault.level)
    return {
        Cause.CLOCK: f"degraded: {who}'s clock is {level} below what power, heat and settings "
        f"explain{at}",
        Cause.THERMAL: f"degraded: {who} slows down for heat in {level} of the time{heat}{at}",
        Cause.BRAKE: f"degraded: a power brake or hardware slowdown holds {who} in {level} of "
        f"the time{at}",
    }[cause]


def _percent(ratio: float) -> str:
    return f"{100.0 * ratio:.0f}%"
