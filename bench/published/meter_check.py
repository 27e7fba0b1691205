"""The emulated A100's meter, heat and clocks against the recorded one.

Meter: the external meter's power goes through the emulated meter (25 ms window, 100 ms
refresh), after this card's own gain and offset; what comes out is compared with what
the driver said. Closed loop: an emulated GPU runs steps that draw what the recorded
load drew, and its temperature, clock and readings are compared with the recording.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from bench.published.rows import MeterRecording
from shaper.core.model.profile import GpuProfile
from shaper.core.types import ClockEventReasons, GpuSample, StepBatch, StepPrediction
from shaper.emulator.meter import Meter, PowerHistory
from shaper.emulator.silicon import EmulatedGpus

_STEP_SECONDS = 0.005


@dataclasses.dataclass(frozen=True, slots=True)
class MeterCheck:
    """How the emulated card differs from the recorded one."""

    gain: float
    offset_watts: float
    """Of the recorded card's meter against the external one."""
    median_error_watts: float
    p95_error_watts: float
    refresh_seconds: float
    """Median time between changes of the recorded reading."""
    rise_error_seconds: float
    """Emulated minus recorded time at which the reading shows the load."""
    loop_watts_error_ratio: float
    """Closed loop: mean absolute error of the reading under load, relative."""
    celsius_rms: float
    celsius_max: float
    clock_hertz: float
    recorded_clock_hertz: float
    reasons: ClockEventReasons


def check_meter(recording: MeterRecording, profile: GpuProfile) -> MeterCheck:
    """Replays the recording through the emulated meter and the emulated GPU."""
    rise, fall = _load_edges(recording)
    gain, offset = _calibration(recording, rise, fall)
    history = PowerHistory(0.0, float(recording.external_watts[0]), 120.0)
    for end, watts in zip(
        recording.external_seconds[1:], recording.external_watts[1:], strict=True
    ):
        history.append(float(end), float(watts))
    inside = (recording.driver_seconds > 1e-3) & (
        recording.driver_seconds < recording.external_seconds[-1]
    )
    times, said = recording.driver_seconds[inside], recording.driver_watts[inside]
    best: tuple[float, np.ndarray] | None = None
    for seed in range(100):  # the phase of the refresh is not recorded: the best of 100
        meter = Meter(profile.meter, seed, exact=True)
        read = gain * np.array([meter.instant_watts(history, float(t)) for t in times]) + offset
        error = float(np.abs(read - said).mean())
        if best is None or error < best[0]:
            best = (error, read)
    assert best is not None
    errors = np.abs(best[1] - said)
    changes = times[1:][np.diff(said) != 0]
    shown = times[np.flatnonzero(best[1] > 120.0)[0]], times[np.flatnonzero(said > 120.0)[0]]
    loop = _closed_loop(recording, profile, rise, fall)
    temperature = np.array([sample.temperature_celsius for sample in loop])
    read = np.array([sample.instant_watts for sample in loop])
    load = (recording.driver_seconds > rise + 0.3) & (recording.driver_seconds < fall)
    off = temperature - recording.driver_celsius
    under = next(s for s, hot in zip(loop, load, strict=True) if hot)
    return MeterCheck(
        gain=gain,
        offset_watts=offset,
        median_error_watts=float(np.median(errors)),
        p95_error_watts=float(np.quantile(errors, 0.95)),
        refresh_seconds=float(np.median(np.diff(changes))),
        rise_error_seconds=float(shown[0] - shown[1]),
        loop_watts_error_ratio=float(
            np.abs(read[load] / recording.driver_watts[load] - 1.0).mean()
        ),
        celsius_rms=float(np.sqrt(np.mean(off**2))),
        celsius_max=float(np.abs(off).max()),
        clock_hertz=float(under.sm_clock_hertz or 0.0),
        recorded_clock_hertz=float(np.median(recording.driver_clock_hertz[load])),
        reasons=under.clock_event_reasons,
    )


def _load_edges(recording: MeterRecording) -> tuple[float, float]:
    smooth = np.convolve(recording.external_watts, np.ones(101) / 101, mode="same")
    busy = np.flatnonzero(smooth > 125.0)
    return float(recording.external_seconds[busy[0]]), float(recording.external_seconds[busy[-1]])


def _calibration(recording: MeterRecording, rise: float, fall: float) -> tuple[float, float]:
    """Gain and offset of the card's meter: two levels, idle and load."""
    external, driver = recording.external_seconds, recording.driver_seconds
    true = [
        float(np.median(recording.external_watts[(external > low) & (external < high)]))
        for low, high in ((0.0, rise - 0.1), (rise + 0.5, fall - 0.2))
    ]
    said = [
        float(np.median(recording.driver_watts[(driver > low) & (driver < high)]))
        for low, high in ((0.0, rise - 0.1), (rise + 0.5, fall - 0.2))
    ]
    gain = (said[1] - said[0]) / (true[1] - true[0])
    return gain, said[0] - gain * true[0]


class _ConstantLoad:
    """A step model of one level, for a GPU that does nothing but hold it."""

    gpu_count = 1

    def __init__(self, watts: float) -> None:
        self._watts = watts

    def predict(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepPrediction:
        """A step of 5 ms at that level, whatever the batch."""
        return StepPrediction(_STEP_SECONDS, _STEP_SECONDS * self._watts)


def _closed_loop(
    recording: MeterRecording, profile: GpuProfile, rise: float, fall: float
) -> list[GpuSample]:
    """The emulated GPU, idle and under the recorded level, sampled when the card was."""
    driver = recording.driver_seconds
    idle = float(np.median(recording.driver_watts[driver < rise - 0.1]))
    load = float(np.median(recording.driver_watts[(driver > rise + 0.5) & (driver < fall - 0.2)]))
    start_celsius = float(np.median(recording.driver_celsius[driver < rise - 0.1]))
    heat = profile.heat
    ambient = start_celsius - idle * (heat.die_kelvin_per_watt + heat.sink_kelvin_per_watt)
    power = dataclasses.replace(
        profile.power,
        idle_watts=min(idle, profile.power.idle_watts),
        context_watts=idle,
        gap_watts=idle,
    )
    card = dataclasses.replace(profile, power=power)
    device = EmulatedGpus(
        card,
        _ConstantLoad(load),
        start_seconds=float(driver[0]) - 2.0,
        ambient_celsius=ambient,
        exact_meter=True,
    )
    samples: list[GpuSample] = []
    now = rise
    for at in driver:
        while now <= at and now < fall:
            now = device.launch(StepBatch(decode_tokens=1), now).end_seconds
        samples.append(device.sample(float(at))[0])
    return samples
