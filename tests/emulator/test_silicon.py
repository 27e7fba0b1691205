"""The emulated GPUs: timeline, power cap, heat, injected trouble."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import ClockEventReasons, StepBatch
from shaper.emulator.heat import HeatModel
from shaper.emulator.shapes import load_shape
from shaper.emulator.silicon import EmulatedGpus
from shaper.errors import ConfigError, GpuLostError
from shaper.gpu.profiles import load_profile

PROFILE = load_profile("h100-sxm")
MODEL = StepModel(PROFILE, WorkCoefficients.from_shape(load_shape("llama-3.1-8b")))
DECODE = StepBatch(decode_requests=8, decode_tokens=8, decode_context_tokens=4800)
PREFILL = StepBatch(
    prefill_requests=1,
    prefill_tokens=4096,
    prefill_context_tokens=4096,
    prefill_token_context_product=4096 * 4096,
    prefill_squared_tokens=4096 * 4096,
)


def gpus(**options: float) -> EmulatedGpus:
    return EmulatedGpus(PROFILE, MODEL, start_seconds=10.0, exact_meter=True, **options)  # type: ignore[arg-type]


def run_for(device: EmulatedGpus, batch: StepBatch, seconds: float, start: float = 10.0) -> float:
    """Launches steps back to back; returns the end of the last."""
    now = start
    while now < start + seconds:
        now = device.launch(batch, now).end_seconds
    return now


def test_an_untroubled_step_is_the_prediction() -> None:
    """No cap, no noise: seconds are those of the model, and so are joules at the die's
    temperature."""
    device = gpus()
    temperature = device.sample(10.5)[0].temperature_celsius
    run = device.launch(DECODE, 10.5)
    expected = MODEL.predict(DECODE, temperature_celsius=temperature)
    assert run.start_seconds == 10.5
    assert run.seconds == pytest.approx(expected.seconds, rel=1e-9)
    assert run.joules == pytest.approx(expected.joules, rel=1e-3)


def test_steps_queue_behind_each_other() -> None:
    """A step that is launched while another runs starts when that one ends."""
    device = gpus()
    first = device.launch(DECODE, 11.0)
    second = device.launch(DECODE, 11.001)
    third = device.launch(DECODE, 12.0)
    assert second.start_seconds == first.end_seconds
    assert third.start_seconds == 12.0
    assert device.free_at_seconds == third.end_seconds


def test_segments_are_contiguous_and_hold_all_energy() -> None:
    """Steps, gaps and idle time leave no hole, and their joules are those of the runs."""
    device = gpus()
    runs = [device.launch(batch, at) for batch, at in ((DECODE, 10.2), (PREFILL, 10.9))]
    device.advance(13.0)
    rows = device.take_segments()
    assert rows[0, 0] == 10.0
    assert rows[-1, 1] == 13.0
    assert np.array_equal(rows[1:, 0], rows[:-1, 1])
    joules = (rows[:, 1] - rows[:, 0]) * rows[:, 2]
    assert joules.sum() == pytest.approx(device.true_joules)
    for run in runs:
        inside = (rows[:, 0] >= run.start_seconds) & (rows[:, 1] <= run.end_seconds)
        assert joules[inside].sum() == pytest.approx(run.joules)
    assert device.take_segments().shape == (0, 3)


def test_a_running_step_is_taken_later() -> None:
    """Only what has ended is handed out."""
    device = gpus()
    run = device.launch(PREFILL, 10.0)
    assert device.take_segments().shape[0] == 0 or device.take_segments()[-1, 1] <= 10.0
    device.advance(run.end_seconds)
    assert device.take_segments()[-1, 1] == run.end_seconds


def test_power_falls_from_gap_to_context() -> None:
    """Between steps the GPU draws its gap power, and after a while that of a context."""
    device = gpus()
    end = device.launch(DECODE, 10.0).end_seconds
    device.advance(end + 1.0)
    rows = device.take_segments()
    assert rows[-2, 2] == PROFILE.power.gap_watts
    assert rows[-2, 1] - rows[-2, 0] == pytest.approx(PROFILE.power.gap_hold_seconds)
    assert rows[-1, 2] == PROFILE.power.context_watts


def test_the_cap_overshoots_briefly_and_then_holds() -> None:
    """Steady prefills under a cap: above it at first, within 3% below it after a second."""
    device = gpus(power_cap_watts=500.0)
    run_for(device, PREFILL, 6.0)
    rows = device.take_segments()
    early = rows[rows[:, 0] < 10.1]
    late = rows[rows[:, 0] > 12.0]
    assert early[:, 2].max() > 550.0
    mean = np.average(late[:, 2], weights=late[:, 1] - late[:, 0])
    assert 0.96 * 500.0 < mean <= 500.0
    assert late[:, 2].max() < 505.0
    sample = device.sample(device.free_at_seconds)[0]
    assert ClockEventReasons.SW_POWER_CAP in sample.clock_event_reasons
    assert sample.sm_clock_hertz is not None
    assert sample.sm_clock_hertz < PROFILE.clocks.sm_max_hertz
    assert (PROFILE.clocks.sm_max_hertz - sample.sm_clock_hertz) % 15e6 == pytest.approx(0.0)
    assert device.reason_seconds()[ClockEventReasons.SW_POWER_CAP] > 3.0


def test_a_capped_step_takes_longer() -> None:
    """Lower clocks make the same prefill slower, and the energy of the whole lower."""
    free, capped = gpus(), gpus(power_cap_watts=400.0)
    run_for(capped, PREFILL, 3.0)
    slow = capped.launch(PREFILL, capped.free_at_seconds)
    fast = free.launch(PREFILL, 10.0)
    assert slow.seconds > 1.1 * fast.seconds
    assert slow.joules < fast.joules


def test_clocks_come_back_when_idle() -> None:
    """Seconds without load bring the clock back to its highest."""
    device = gpus(power_cap_watts=400.0)
    end = run_for(device, PREFILL, 3.0)
    device.advance(end + 2.0)
    run = device.launch(DECODE, end + 2.0)
    assert run.seconds == pytest.approx(MODEL.predict(DECODE).seconds, rel=1e-6)


def test_heat_lowers_clocks_and_then_shuts_down() -> None:
    """Hot air slows the GPU first, then brakes it; above the last limit it is lost."""
    device = gpus()
    device.set_ambient(62.0)
    end = run_for(device, DECODE, 400.0)
    sample = device.sample(end)[0]
    assert ClockEventReasons.SW_THERMAL_SLOWDOWN in sample.clock_event_reasons
    assert sample.temperature_celsius == pytest.approx(PROFILE.heat.slowdown_celsius, abs=4.0)
    device.set_ambient(120.0)
    with pytest.raises(GpuLostError, match="shut down"):
        run_for(device, DECODE, 400.0, end)


def test_a_power_brake_drops_the_clock_at_once() -> None:
    """The brake's reasons show, and letting go brings the clock back."""
    device = gpus()
    device.set_power_brake(True)
    braked = device.launch(PREFILL, 10.0)
    sample = device.sample(10.01)[0]
    assert ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN in sample.clock_event_reasons
    assert ClockEventReasons.HW_SLOWDOWN in sample.clock_event_reasons
    assert braked.seconds > 1.5 * MODEL.predict(PREFILL).seconds
    device.set_power_brake(False)
    end = run_for(device, DECODE, 3.0, braked.end_seconds)
    assert device.sample(end)[0].clock_event_reasons == ClockEventReasons.NONE


def test_a_sagging_clock_gives_no_reason() -> None:
    """A gray failure: the clock is low and nothing says why."""
    device = gpus()
    device.set_clock_ceiling(990e6)
    device.launch(DECODE, 10.0)
    sample = device.sample(10.001)[0]
    assert sample.sm_clock_hertz == 990e6
    assert sample.clock_event_reasons == ClockEventReasons.NONE


def test_noise_is_seeded() -> None:
    """The same seed gives the same run, another seed another one."""
    ends = [run_for(gpus(seed=seed, step_noise_ratio=0.05), DECODE, 0.5) for seed in (1, 1, 2)]
    assert ends[0] == ends[1] != ends[2]


def test_two_gpus_draw_twice_the_power() -> None:
    """Each GPU has its sample, and the segments are of both together."""
    model = StepModel(PROFILE, WorkCoefficients.from_shape(load_shape("llama-3.1-8b"), 2))
    device = EmulatedGpus(PROFILE, model, start_seconds=0.0, exact_meter=True)
    device.advance(5.0)
    assert device.take_segments()[0, 2] == 2 * PROFILE.power.context_watts
    samples = device.sample(5.0)
    assert [sample.gpu_index for sample in samples] == [0, 1]
    assert all(
        sample.average_watts == pytest.approx(PROFILE.power.context_watts) for sample in samples
    )


@pytest.mark.parametrize("watts", [50.0, 900.0])
def test_a_cap_out_of_range_is_refused(watts: float) -> None:
    """The message names the range."""
    with pytest.raises(ConfigError, match="200 to 700 W"):
        gpus(power_cap_watts=watts)


def test_a_count_that_is_not_the_models_is_refused() -> None:
    """One model can't drive three GPUs' energy."""
    with pytest.raises(ConfigError, match="gpu_count is 3"):
        EmulatedGpus(PROFILE, MODEL, gpu_count=3, start_seconds=0.0)


def test_two_threads_lose_nothing() -> None:
    """Sampling and taking while another thread launches leaves the timeline whole."""
    device = gpus()
    rows: list[np.ndarray] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            device.sample(device.free_at_seconds)
            rows.append(device.take_segments())

    thread = threading.Thread(target=watch)
    thread.start()
    now = 10.0
    for _ in range(2000):
        now = device.launch(DECODE, now + 1e-4).end_seconds
    stop.set()
    thread.join()
    device.advance(now)
    whole = np.concatenate([*rows, device.take_segments()])
    assert np.array_equal(whole[1:, 0], whole[:-1, 1])
    joules = ((whole[:, 1] - whole[:, 0]) * whole[:, 2]).sum()
    assert joules == pytest.approx(device.true_joules)


@given(
    gaps=st.lists(st.floats(0.0, 0.3), min_size=1, max_size=12),
    tokens=st.lists(st.integers(1, 8192), min_size=12, max_size=12),
    cap=st.floats(250.0, 700.0),
)
def test_any_run_keeps_the_books(gaps: list[float], tokens: list[int], cap: float) -> None:
    """Whatever is launched: time goes forward, steps don't overlap, energy adds up."""
    device = gpus(power_cap_watts=cap)
    now, last = 10.0, 10.0
    for gap, count in zip(gaps, tokens, strict=False):
        now += gap
        batch = StepBatch(
            prefill_requests=1,
            prefill_tokens=count,
            prefill_context_tokens=count,
            prefill_token_context_product=count * count,
            prefill_squared_tokens=count * count,
        )
        run = device.launch(batch, now)
        assert run.start_seconds >= max(now, last)
        assert run.end_seconds > run.start_seconds
        last = run.end_seconds
    device.advance(last)
    rows = device.take_segments()
    assert ((rows[:, 1] - rows[:, 0]) * rows[:, 2]).sum() == pytest.approx(device.true_joules)


def test_heat_by_hand() -> None:
    """One stage charges by 63% in its time constant; both end at the sum of resistances."""
    spec = PROFILE.heat
    heat = HeatModel(spec, 0.0)
    assert heat.die_celsius == spec.ambient_celsius
    tau = spec.die_kelvin_per_watt * spec.die_joules_per_kelvin
    heat.step(tau, 500.0)
    assert heat.die_celsius - heat.sink_celsius == pytest.approx(
        0.632 * 500.0 * spec.die_kelvin_per_watt, rel=0.06
    )
    for _ in range(100):
        heat.step(10.0, 500.0)
    assert heat.die_celsius == pytest.approx(heat.steady_celsius(500.0), abs=0.1)
