"""What is rebuilt from steps and an energy counter, against emulated GPUs whose truth is known."""

from __future__ import annotations

import pytest

from bench.studies.gpu.measure import power_view, recording_model
from shaper.errors import TraceError
from shaper.recording.format import Recording
from shaper.traffic.figures import grid_between, power_figures
from tests.studies.gpu_fakes import META, START_SECONDS, emulated_recording

SECONDS = 12.0


def test_rebuilt_power_is_the_true_power():
    """Mean and highest 100 ms mean come back, and predicted equals measured in each window."""
    recording, truth = emulated_recording(SECONDS)
    end = START_SECONDS + SECONDS
    view = power_view(recording, recording_model(recording), START_SECONDS, end)
    true = power_figures(grid_between(truth, START_SECONDS, end))
    assert power_figures(view.grid).peak_watts == pytest.approx(true.peak_watts, rel=0.02)
    assert power_figures(view.grid).mean_watts == pytest.approx(true.mean_watts, rel=0.01)
    assert len(view.measured_watts) >= 18
    assert view.windows.median_absolute_ratio < 0.02
    assert view.decodes.median_absolute_ratio < 0.01
    assert view.prompts.median_absolute_ratio < 0.01
    assert view.prompts.count > 50


@pytest.mark.parametrize("ratio", [0.85, 1.2])
def test_a_wrong_model_shows_in_the_ratio_and_not_in_the_peak(ratio):
    """The counter corrects the level: the rebuilt peak stays true where all joules are off."""
    recording, truth = emulated_recording(SECONDS, joules_ratio=ratio)
    end = START_SECONDS + SECONDS
    view = power_view(recording, recording_model(recording), START_SECONDS, end)
    true = power_figures(grid_between(truth, START_SECONDS, end))
    assert view.counter_ratio == pytest.approx(ratio, rel=0.04)
    assert power_figures(view.grid).peak_watts == pytest.approx(true.peak_watts, rel=0.04)


def test_the_counters_gain_is_part_of_its_watts():
    """All power is in the counter's watts: a meter that is off moves the ratio by as much."""
    exact, _ = emulated_recording(SECONDS)
    drawn, _ = emulated_recording(SECONDS, exact_meter=False)
    model = recording_model(exact)
    end = START_SECONDS + SECONDS
    ratios = [power_view(each, model, START_SECONDS, end).counter_ratio for each in (exact, drawn)]
    last = [each.samples[-1].energy_joules for each in (exact, drawn)]
    assert last[0] is not None
    assert last[1] is not None
    assert abs(last[1] / last[0] - 1.0) > 0.001
    assert ratios[1] / ratios[0] == pytest.approx(last[1] / last[0], rel=0.005)


def test_without_an_energy_counter_the_model_stands_alone():
    """No window, and the rebuilt power is the model's."""
    recording, _ = emulated_recording(3.0)
    blind = Recording(META, recording.steps, ())
    end = START_SECONDS + 3.0
    view = power_view(blind, recording_model(blind), START_SECONDS, end)
    assert view.counter_ratio == 1.0
    assert not len(view.measured_watts)
    assert power_figures(view.grid).peak_watts > 300.0
    assert not len(view.instant_watts)


def test_a_recording_that_says_nothing_is_an_error():
    """No steps in the time of the traffic, or no GPU in its meta: one line says which."""
    recording, _ = emulated_recording(1.0)
    with pytest.raises(TraceError, match="no step"):
        power_view(recording, recording_model(recording), 100.0, 110.0)
    with pytest.raises(TraceError, match="which GPU"):
        recording_model(Recording({}, recording.steps, ()))
