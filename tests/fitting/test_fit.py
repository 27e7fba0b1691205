"""`shaper fit`: the emulator's own parameters come back from its recordings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from shaper.cli.fit import as_dict, main, profile_text, summary
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import GpuSample, StepBatch
from shaper.emulator.shapes import load_model_config, load_shape
from shaper.errors import ConfigError, TraceError
from shaper.fitting import FitResult, fit_recording
from shaper.fitting.common import replaced, value_of
from shaper.fitting.power import energy_windows
from shaper.gpu.profiles import load_profile, profile_sources
from shaper.recording.format import RecordedStep, Recording, RecordingWriter
from tests.emulator.recorded import decode_and_prefill, record

BASE = load_profile("h100-sxm")
COEFFICIENTS = WorkCoefficients.from_shape(load_shape("llama-3.1-8b"))
TRUE = {
    "memory.gemm_ratio": 0.75,
    "memory.attention_ratio": 0.85,
    "compute.gemm_ratio": 0.65,
    "kernel.layer_seconds": 2.5e-5,
    "kernel.sampler_seconds_per_logit": 2.0e-10,
    "host.prefill_seconds": 4.0e-4,
    "power.context_watts": 100.0,
    "power.gap_watts": 150.0,
    "power.active_watts": 90.0,
    "power.joules_per_byte": 1.2e-10,
    "power.joules_per_kv_byte": 1.5e-10,
    "power.joules_per_flop": 6.0e-13,
    "power.sampler_watts": 250.0,
}


@pytest.fixture(scope="module")
def recording() -> Recording:
    """Ten minutes of varied steps with 1% noise on a GPU that is not the profile's."""
    return record(replaced(BASE, TRUE), COEFFICIENTS, seconds=600.0)


@pytest.fixture(scope="module")
def result(recording: Recording) -> FitResult:
    """What the fit makes of it, starting from the H100's profile."""
    return fit_recording(recording, BASE, COEFFICIENTS)


def test_the_emulators_parameters_come_back(result: FitResult) -> None:
    """Every parameter that differs from the profile is identified and within 5%."""
    found = {one.name: one for one in result.parameters}
    for name, value in TRUE.items():
        assert found[name].identified, (name, found[name].reason)
        assert found[name].value == pytest.approx(value, rel=0.05), name
        low, high = found[name].low, found[name].high
        assert low is not None
        assert high is not None
        assert low < found[name].value < high
    assert result.seconds_error < 0.02
    assert result.joules_error is not None
    assert result.joules_error < 0.01


def test_the_intervals_hold_the_truth() -> None:
    """Of the 95% intervals of a minute's recordings, 85 to 100% hold the emulator's value.

    FIT_EXAMPLES is the number of recordings; 40 for the whole figure.
    """
    truth = replaced(BASE, TRUE)
    missed: list[str] = []
    intervals = 0
    examples = int(os.environ.get("FIT_EXAMPLES", "4"))
    for seed in range(examples):
        found = fit_recording(
            record(truth, COEFFICIENTS, seconds=60.0, seed=seed), BASE, COEFFICIENTS
        )
        for one in found.parameters:
            if one.low is not None and one.high is not None:
                intervals += 1
                if not one.low <= value_of(truth, one.name) <= one.high:
                    missed.append(f"{one.name} of recording {seed}")
    assert intervals >= 14 * examples
    assert len(missed) <= 0.15 * intervals, (intervals, missed)


def test_what_one_gpu_does_not_show_is_said(result: FitResult) -> None:
    """With one GPU there is no all-reduce: the profile's value stays."""
    kept = next(one for one in result.parameters if one.name == "link.allreduce_seconds")
    assert not kept.identified
    assert kept.value == BASE.link.allreduce_seconds
    assert "one GPU" in kept.reason
    assert "link.allreduce_seconds" in summary(result, "h100-sxm").split("not identified")[1]


def test_one_kind_of_step_identifies_little() -> None:
    """Steps that are all alike say which parameters they can't tell apart, and keep them."""
    only = decode_and_prefill(32, 1000, 0)
    same = record(BASE, COEFFICIENTS, seconds=60.0, only=only)
    found = fit_recording(same, BASE, COEFFICIENTS)
    by_name = {one.name: one for one in found.parameters}
    for name in ("host.prefill_seconds", "compute.attention_ratio", "compute.gemm_ratio"):
        assert not by_name[name].identified
        assert by_name[name].value == by_name[name].profile_value
        assert by_name[name].reason
    assert sum(one.identified for one in found.parameters[:9]) <= 1
    assert found.seconds_error < 0.03


def test_without_a_meter_only_latency_is_fitted(recording: Recording) -> None:
    """A recording without energy readings leaves the power parameters alone and says so."""
    steps = recording.steps[:2000]
    found = fit_recording(Recording({}, steps, ()), BASE, COEFFICIENTS)
    assert found.joules_error is None
    assert found.profile.power == BASE.power
    power = [one for one in found.parameters if one.name.startswith("power.")]
    assert all("energy counter" in one.reason for one in power)
    assert any(one.identified for one in found.parameters)


def test_too_few_steps_are_refused() -> None:
    """A handful of steps is no recording."""
    step = RecordedStep(0.0, 0.01, StepBatch(decode_requests=1, decode_tokens=1))
    with pytest.raises(TraceError, match="3 steps with tokens; a fit needs at least 50"):
        fit_recording(Recording({}, (step,) * 3, ()), BASE, COEFFICIENTS)


def test_energy_windows_by_hand() -> None:
    """A window starts and ends half way between the readings around a change, and sums GPUs."""
    samples = [
        GpuSample(at / 10.0, gpu, energy_joules=100.0 * (at // 5))
        for at in range(16)
        for gpu in (0, 1)
    ]
    assert energy_windows(samples) == [
        pytest.approx((0.45, 0.95, 200.0)),
        pytest.approx((0.95, 1.45, 200.0)),
    ]
    assert energy_windows([]) == []


def test_the_profile_that_is_written_is_read(result: FitResult, tmp_path: Path) -> None:
    """The file names its base, holds what was fitted with its interval, and nothing else."""
    path = tmp_path / "mine.toml"
    path.write_text(profile_text(result, "h100-sxm", "mine", "run.csv"))
    mine, sources = load_profile(str(path)), profile_sources(str(path))
    assert mine.name == "mine"
    assert mine.power.gap_watts == pytest.approx(result.profile.power.gap_watts, rel=1e-5)
    assert mine.memory.capacity_bytes == BASE.memory.capacity_bytes
    assert "95% interval" in sources["power.gap_watts"]
    assert (
        sources["link.allreduce_seconds"] == profile_sources("h100-sxm")["link.allreduce_seconds"]
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_command_makes_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """From the file that an engine writes to a profile that loads."""
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    short = record(BASE, COEFFICIENTS, seconds=20.0)
    path = tmp_path / f"run.{ending}"
    writer = RecordingWriter(
        path,
        {
            "gpu": "h100-sxm",
            "tensor_parallel": 1,
            "model_config": load_model_config("llama-3.1-8b"),
        },
    )
    writer.write(short.steps, short.samples)
    writer.close()
    output = tmp_path / "fitted.toml"
    assert main([str(path), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "95% interval" in printed
    assert load_profile(str(output)).name == "fitted"
    assert main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] > 100
    assert set(found["parameters"]) == set(
        as_dict(fit_recording(short, BASE, COEFFICIENTS))["parameters"]
    )


@pytest.mark.parametrize(
    ("meta", "arguments", "message"),
    [
        ({}, [], "which GPU it is of: give --gpu"),
        ({"gpu": "h100-sxm"}, [], "which model it is of: give --model"),
        ({"gpu": "h100-sxm"}, ["--model", "llama-3.1-8b", "--tp", "3"], "3 does not divide"),
        ({"gpu": "h100-sxm"}, ["--model", "gpt-9"], "neither a built-in shape"),
        ({"gpu": "h1"}, ["--model", "llama-3.1-8b"], "unknown GPU 'h1'"),
        ({"gpu": "h100-sxm"}, ["--output", "x.json"], r"must end in \.toml"),
        ({"gpu": "h100-sxm"}, ["--tp", "two"], "invalid int value"),
        ({"gpu": "h100-sxm", "model_config": {"a": 1}}, [], "num_hidden_layers"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, meta: dict[str, object], arguments: list[str], message: str
) -> None:
    """One line that names what to give."""
    path = tmp_path / "run.csv"
    RecordingWriter(path, meta).close()
    with pytest.raises((ConfigError, TraceError), match=message):
        main([str(path), *arguments])


def test_without_scipy_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy comes with an extra; without it one line names the package."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match="pip install scipy"):
        main([str(tmp_path / "run.csv")])
