"""The parts of `bench.gpu_characterise`, by hand and in virtual time."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from bench.characterise import output
from bench.characterise.plan import Budget
from bench.characterise.points import Point, between_steps, make_point
from bench.characterise.runner import StepLog
from bench.characterise.waves import describe_cap, infer_meter
from shaper.core.types import ClockEventReasons, GpuSample, StepBatch, StepPrediction
from shaper.emulator.silicon import EmulatedGpus
from shaper.gpu.profiles import load_profile
from shaper.recording.format import RecordedStep

ONE = StepBatch(decode_requests=1, decode_tokens=1, decode_context_tokens=10)


def test_a_step_starts_when_its_predecessor_ended() -> None:
    """Launched ahead, it waits; launched late, it starts then; an empty step is none."""
    log = StepLog()
    log.launched(1.0, ONE)
    log.launched(1.1, ONE)
    log.returned(2.0)
    log.ended(3.0)
    log.launched(5.0, None)
    log.returned(5.5)
    log.launched(6.0, ONE)
    log.returned(6.1)
    log.returned(7.0)
    spans = [(step.start_seconds, step.end_seconds) for step in log.take()]
    assert spans == [(1.0, 2.0), (2.0, 3.0), (6.0, 7.0)]
    assert log.take() == []


def test_power_is_taken_between_changes_of_the_counter() -> None:
    """The counter stands still between refreshes: only where it moves is the time known."""
    samples = [
        GpuSample(read_seconds=0.02 * i, gpu_index=0, energy_joules=30.0 * (0.02 * i // 0.1))
        for i in range(51)
    ]
    steps = [RecordedStep(0.1 * i, 0.1 * i + 0.05, ONE) for i in range(10)]
    point = make_point("decode", {"batch": 1}, (0.0, 1.0), steps, samples)
    assert point.watts == pytest.approx(300.0, rel=0.03)
    assert point.busy_ratio == pytest.approx(0.5)
    assert point.step_joules == pytest.approx(30.0, rel=0.03)
    assert point.mean_context_tokens == 10
    nothing = make_point("decode", {"batch": 1}, (0.0, 0.04), steps, samples)
    assert nothing.watts is None


def test_power_between_steps_is_the_line_s_foot() -> None:
    """140 W between steps and 2 J above it for each step, at three cadences."""
    points = [
        Point(
            stage="cadence",
            settings={"batch": 16, "cadence_seconds": period},
            start_seconds=0.0,
            end_seconds=100 * period,
            steps=100,
            watts=140.0 + 2.0 / period,
        )
        for period in (0.01, 0.02, 0.04)
    ]
    (found,) = between_steps(points)
    assert found.batch == 16
    assert found.gap_watts == pytest.approx(140.0)
    assert found.step_excess_joules == pytest.approx(2.0)
    assert found.error_watts == pytest.approx(0.0, abs=1e-6)
    assert between_steps(points[:1]) == []


class Level:
    """A step of 10 ms that draws 500 W."""

    gpu_count = 1

    def predict(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepPrediction:
        return StepPrediction(0.01, 5.0)


@pytest.mark.parametrize(("instant", "average"), [(0.025, 1.0), (0.1, 0.5)])
def test_the_meter_s_windows_are_found(instant: float, average: float) -> None:
    """Square waves in virtual time, through meters whose windows are known."""
    profile = load_profile("h100-sxm")
    power = profile.power
    level = dataclasses.replace(power, gap_watts=power.context_watts)
    spec = dataclasses.replace(
        profile.meter, instant_window_seconds=instant, average_window_seconds=average
    )
    profile = dataclasses.replace(profile, meter=spec, power=level)
    gpus = EmulatedGpus(profile, Level(), start_seconds=0.0, exact_meter=True, seed=3)
    steps: list[RecordedStep] = []
    samples: list[GpuSample] = []
    now, sampled = 1.0, 0.0
    for on, cycles in ((0.05, 30), (0.1, 15), (0.2, 8), (0.5, 4), (1.0, 3)):
        for _ in range(cycles):
            rise, end = now, now
            while end < rise + on:
                ran = gpus.launch(ONE, end)
                steps.append(RecordedStep(ran.start_seconds, ran.end_seconds, ONE))
                end = ran.end_seconds
                while sampled <= end:
                    samples += gpus.sample(sampled)
                    sampled += 0.02
            now = rise + 2.13 * on
            while sampled <= now:
                samples += gpus.sample(sampled)
                sampled += 0.02
    energy, instant_found, average_found = infer_meter(steps, samples, 0.02)
    assert energy.refresh_seconds == pytest.approx(0.1, abs=0.021)
    assert instant_found.refresh_seconds == pytest.approx(0.1, abs=0.021)
    assert instant_found.window_seconds == pytest.approx(instant, abs=0.012)
    assert average_found.window_seconds == pytest.approx(average, rel=0.1)
    assert instant_found.load_watts == pytest.approx(500.0, rel=0.03)
    assert instant_found.rest_watts == pytest.approx(power.context_watts, abs=15)


def test_readings_that_never_change_show_nothing() -> None:
    """No window is made up."""
    samples = [GpuSample(0.02 * i, 0, instant_watts=100.0) for i in range(100)]
    energy, instant, average = infer_meter([RecordedStep(0.0, 1.0, ONE)], samples, 0.02)
    assert energy.refresh_seconds is None
    assert instant.window_seconds is None
    assert average.window_seconds is None


def test_the_power_cap_is_described() -> None:
    """When it set in, and where the clock went."""
    samples = [
        GpuSample(
            read_seconds=0.1 * i,
            gpu_index=0,
            instant_watts=720.0 if i < 2 else 690.0,
            enforced_limit_watts=700.0,
            sm_clock_hertz=1.98e9 if i < 2 else 1.5e9,
            clock_event_reasons=ClockEventReasons(0 if i < 2 else 4),
        )
        for i in range(10)
    ]
    found = describe_cap(samples, 0.0)
    assert found["first_capped_seconds"] == pytest.approx(0.2)
    assert found["capped_ratio"] == pytest.approx(0.8)
    assert found["settled_sm_clock_hertz"] == 1.5e9
    assert found["highest_instant_watts"] == 720.0


def test_time_is_left_for_the_stage_and_for_the_run() -> None:
    """Whichever ends first."""
    now = 0.0
    budget = Budget(100.0, 40.0, lambda: now)
    assert budget.fits(40.0)
    assert not budget.fits(41.0)
    now = 70.0
    assert not budget.fits(1.0)
    budget.start_stage()
    assert budget.fits(30.0)
    assert not budget.fits(31.0)


def test_without_pyarrow_the_recording_is_csv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And one stage alone has files of its own."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    files = output.files_in(tmp_path, "decode")
    assert files.recording == tmp_path / "recording-decode.csv"
    assert files.points == tmp_path / "points-decode.json"


def test_the_engine_is_given_its_attention_backend() -> None:
    """And none by default."""
    from bench.characterise.engine import EngineSettings, engine_arguments

    named = engine_arguments(EngineSettings(attention_backend="FLASH_ATTN"))
    assert named["attention_backend"] == "FLASH_ATTN"
    assert named["load_format"] == "dummy"
    assert "attention_backend" not in engine_arguments(EngineSettings())
