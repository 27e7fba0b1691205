"""What the meter shows of a known power curve."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import StepBatch
from shaper.emulator.meter import EmulatedReader, Meter, PowerHistory
from shaper.emulator.shapes import load_shape
from shaper.emulator.silicon import EmulatedGpus
from shaper.gpu.profiles import load_profile

SPEC = load_profile("h100-sxm").meter


def step_up() -> PowerHistory:
    """100 W up to t = 5 s, 500 W up to t = 10 s."""
    history = PowerHistory(0.0, 100.0, 60.0)
    history.append(5.0, 100.0)
    history.append(10.0, 500.0)
    return history


def test_history_by_hand() -> None:
    """Energy is the area below the steps."""
    history = step_up()
    assert history.energy_joules(5.0) == pytest.approx(500.0)
    assert history.energy_joules(6.0) == pytest.approx(1000.0)
    assert history.mean_watts(4.0, 6.0) == pytest.approx(300.0)
    assert history.energy_joules(-1.0) == pytest.approx(-100.0)


def test_instant_waits_for_its_refresh() -> None:
    """A step of power shows at the next refresh, up to 100 ms later, and not before."""
    meter, history = Meter(SPEC, exact=True), step_up()
    seen = [meter.instant_watts(history, 5.0 + k * 1e-3) for k in range(201)]
    assert seen[0] == pytest.approx(100.0)
    assert seen[-1] == pytest.approx(500.0)
    changes = [k for k in range(1, 201) if seen[k] != seen[k - 1]]
    assert 1 <= len(changes) <= 2
    assert changes[0] <= 101


def test_average_ramps_over_a_second() -> None:
    """Half a second after a step the 1 s average is about half way."""
    meter, history = Meter(SPEC, exact=True), step_up()
    assert meter.average_watts(history, 5.0) == pytest.approx(100.0)
    assert meter.average_watts(history, 5.55) == pytest.approx(300.0, abs=45.0)
    assert meter.average_watts(history, 6.2) == pytest.approx(500.0)


def test_the_meter_is_blind_between_its_windows() -> None:
    """A burst that falls into the 75 ms that no window covers is not seen by `instant`,
    and is counted by the energy counter."""
    meter = Meter(SPEC, exact=True)
    quiet = PowerHistory(0.0, 100.0, 60.0)
    quiet.append(20.0, 100.0)
    refresh = next(
        k * 1e-3
        for k in range(5000, 5200)
        if meter._last_refresh(k * 1e-3, 0.1) > meter._last_refresh((k - 1) * 1e-3, 0.1)
    )
    burst = PowerHistory(0.0, 100.0, 60.0)
    burst.append(refresh + 0.01, 100.0)
    burst.append(refresh + 0.06, 700.0)
    burst.append(20.0, 100.0)
    seen = max(meter.instant_watts(burst, refresh + k * 1e-3) for k in range(400))
    assert seen == pytest.approx(100.0)
    gained = meter.energy_joules(burst, 15.0, 0.0) - meter.energy_joules(quiet, 15.0, 0.0)
    assert gained == pytest.approx(0.05 * 600.0)


def test_energy_counter_never_falls() -> None:
    """The counter steps up at each refresh and stays in between."""
    meter, history = Meter(SPEC, exact=True), step_up()
    seen = [meter.energy_joules(history, k * 0.01, 0.0) for k in range(1000)]
    assert seen == sorted(seen)
    assert len(set(seen)) == pytest.approx(100, abs=2)


@given(seed=st.integers(0, 10_000))
def test_gain_stays_within_its_bound(seed: int) -> None:
    """Each meter has one gain, the same for all its readings, within the profile's bound."""
    meter, history = Meter(SPEC, seed), step_up()
    assert abs(meter.gain - 1.0) <= SPEC.gain_error_ratio
    assert meter.instant_watts(history, 4.0) == pytest.approx(100.0 * meter.gain)
    assert meter.average_watts(history, 4.0) == pytest.approx(100.0 * meter.gain)
    assert meter.energy_joules(history, 4.0, 0.0) == pytest.approx(
        meter.gain * history.energy_joules(meter._last_refresh(4.0, 0.1))
    )


def test_two_gpus_have_two_gains() -> None:
    """Meters of one seed differ by GPU."""
    assert Meter(SPEC, 1).gain != Meter(SPEC, 2).gain


def test_an_offset_is_added() -> None:
    """A meter may read some watts too many, also when integrating."""
    spec = dataclasses.replace(SPEC, gain_error_ratio=0.0, offset_error_watts=10.0)
    meter, history = Meter(spec, 3), step_up()
    assert meter.instant_watts(history, 4.0) == pytest.approx(100.0 + meter.offset_watts)
    assert abs(meter.offset_watts) <= 10.0


def test_history_forgets_what_is_old() -> None:
    """Hours of steps keep the history short, and recent energy exact."""
    history = PowerHistory(0.0, 100.0, keep_seconds=3.0)
    for k in range(20_000):
        history.append((k + 1) * 0.01, 100.0 + (k % 2) * 200.0)
    assert history.mean_watts(198.0, 200.0) == pytest.approx(200.0)
    assert len(history._times) < 6000


def test_the_reader_reads_at_its_clock() -> None:
    """`EmulatedReader` asks the GPUs at the time that its clock gives."""
    profile = load_profile("h200-sxm")
    model = StepModel(profile, WorkCoefficients.from_shape(load_shape("llama-3.1-8b")))
    device = EmulatedGpus(profile, model, start_seconds=0.0, exact_meter=True)
    now = 3.0
    reader = EmulatedReader(device, lambda: now)
    (sample,) = reader.read()
    assert sample.read_seconds == 3.0
    assert sample.average_watts == pytest.approx(profile.power.context_watts)
    assert sample.enforced_limit_watts == profile.power.limit_watts
    assert reader.gpus[0].name == "NVIDIA H200"
    device.launch(StepBatch(decode_requests=1, decode_tokens=1, decode_context_tokens=10), 3.0)
    now = 4.0
    (later,) = reader.read()
    assert later.energy_joules is not None
    assert sample.energy_joules is not None
    assert later.energy_joules > sample.energy_joules
    reader.close()
    reader.close()
