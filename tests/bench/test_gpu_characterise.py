"""`bench.gpu_characterise`: its parts by hand and in virtual time, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu_characterise
from bench.characterise import kernels, output
from bench.characterise.plan import QUICK, STAGES, Budget
from bench.characterise.points import Point, between_steps, make_point
from bench.characterise.runner import StepLog
from bench.characterise.waves import describe_cap, infer_meter
from shaper.core.types import ClockEventReasons, GpuSample, StepBatch, StepPrediction
from shaper.emulator.silicon import EmulatedGpus
from shaper.gpu import nvml
from shaper.gpu.profiles import load_profile
from shaper.recording import RecordedStep, read_recording
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

ROOT = Path(__file__).resolve().parents[2]
ONE = StepBatch(decode_requests=1, decode_tokens=1, decode_context_tokens=10)


def run(*arguments: str) -> int:
    return gpu_characterise.main(arguments)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_characterise", *arguments]


def results(folder: Path, tail: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"points{tail}.json").read_text())
    return found


# The parts.


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
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
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


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "sleep", "--out", "x"], "invalid choice"),
        (["--stage", "decode"], "--out"),
        (["--out", "x", "--emulate", "h300"], "h300"),
        (["--out", "x", "--emulate", "h200-sxm", "--model", "nothing"], "nothing"),
        (["--out", "x", "--seconds-per-point", "-1"], "not above 0"),
        (["--out", "x", "--gpu-memory-utilization", "2"], "above 1"),
        (["--out", "/proc/no/such", "--emulate", "h200-sxm"], "/proc/no/such"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """On stderr, and the exit code is 2."""
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No driver, and a GPU without CUDA in torch: both exit with 2."""
    import pynvml

    missing = FakeNvml([], init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(nvml, "pynvml", missing)
    assert run("--out", str(tmp_path / "a")) == 2
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    monkeypatch.setattr(nvml, "pynvml", FakeNvml([FakeGpu("GPU-a")]))
    quick = ("--idle-seconds", "0.05", "--torch-only")
    assert run("--out", str(tmp_path / "b"), *quick) == 2
    error = capsys.readouterr().err
    assert "NVIDIA driver" in error
    assert "--torch-only needs CUDA" in error


# Whole runs.


class CountingNvml(FakeNvml):
    """A driver whose energy counter moves; notes everything that is asked of it."""

    def __init__(self, device: FakeGpu) -> None:
        super().__init__([device])
        self.asked: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            super().__getattribute__("asked").add(name)
        return super().__getattribute__(name)

    def _get(self, name: str, handle: FakeGpu, *arguments: int) -> Any:
        if name == "nvmlDeviceGetTotalEnergyConsumption":
            handle.energy_millijoules = (handle.energy_millijoules or 0) + 6_000
        return super()._get(name, handle, *arguments)


def small_model(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 32768,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_real_gpu_is_only_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All stages over a fake driver, the load being torch on the CPU: no setter is called."""
    torch = pytest.importorskip("torch")
    fake = CountingNvml(FakeGpu("GPU-a"))
    monkeypatch.setattr(nvml, "pynvml", fake)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    on_cpu = partial(kernels.TorchSteps, device="cpu", kv_tokens=40_000, largest_chunk=2048)
    monkeypatch.setattr(kernels, "TorchSteps", on_cpu)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    model = small_model(tmp_path / "small")
    plan = ("--quick", "--seconds-per-point", "0.05", "--idle-seconds", "0.05")
    out = tmp_path / "out"
    assert run("--out", str(out), "--model", str(model), "--torch-only", *plan) == 0
    getters = {name for name in fake.asked if name.startswith("nvmlDevice")}
    assert getters
    assert all(name.startswith("nvmlDeviceGet") for name in getters), getters
    assert fake.open_count == 0
    found = results(out)
    assert {point["stage"] for point in found["points"]} == set(STAGES) - {"reads"}
    assert found["points"][0]["extra"] == {"when": "before, no engine"}
    assert found["meta"]["gpu"] == "h200-sxm"
    names = {cost["name"] for cost in found["findings"]["reads"]}
    assert {"a whole sample", "nvmlDeviceGetTotalEnergyConsumption"} <= names
    recording = read_recording(next(out.glob("recording.*")))
    assert {step.batch.prefill_tokens for step in recording.steps} >= set(QUICK.chunks_tokens)


def test_what_no_longer_fits_is_skipped_and_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With two seconds in all, most points are not run, and each is named."""
    limits = ("--total-seconds", "2", "--quick", "--idle-seconds", "0.1")
    assert run("--out", str(tmp_path), "--emulate", "h200-sxm", "--torch-only", *limits) == 0
    skipped = results(tmp_path)["skipped"]
    assert any(what.startswith("prefill: chunk 2048 after 1024") for what in skipped)
    assert "don't fit the time left" in capsys.readouterr().out
    assert "## Skipped" in (tmp_path / "summary.md").read_text()


def test_an_interrupt_keeps_what_there_is(tmp_path: Path) -> None:
    """Ctrl-C after the first cadence: exit code 130, and all files are there."""
    arguments = ("--out", str(tmp_path), "--emulate", "h200-sxm", "--torch-only", "--quick")
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("cadence"):
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=60)
    assert process.returncode == 130
    found = results(tmp_path)
    assert found["interrupted"]
    assert [point["stage"] for point in found["points"]][:2] == ["idle", "cadence"]
    recording = read_recording(next(tmp_path.glob("recording.*")))
    assert len(recording.steps) >= 16
    assert recording.samples


@pytest.mark.e2e
def test_a_whole_run_over_vllm(tmp_path: Path) -> None:
    """vLLM's engine on the emulated GPU, all stages; the recording is exact and can be fitted."""
    pytest.importorskip("vllm")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SHAPER", "VLLM"))}
    done = subprocess.run(
        command("--emulate", "h200-sxm", "--quick", "--out", str(tmp_path)),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["skipped"] == []
    assert {point["stage"] for point in found["points"]} == set(STAGES) - {"reads"}
    for point in found["points"]:
        settings = point["settings"]
        if point["stage"] == "prefill":
            assert point["tokens"] == point["steps"] * settings["chunk_tokens"]
            assert point["mean_context_tokens"] == settings["context_tokens"]
        elif "batch" in settings:
            assert point["tokens"] == point["steps"] * settings["batch"]
    profile = load_profile("h200-sxm")
    for between in found["between_steps"]:
        assert between["gap_watts"] == pytest.approx(profile.power.gap_watts, rel=0.2)
    recording = read_recording(next(tmp_path.glob("recording.*")))
    assert recording.meta["gpu"] == "h200-sxm"
    ends = np.array([step.end_seconds for step in recording.steps])
    starts = np.array([step.start_seconds for step in recording.steps])
    assert np.all(starts[1:] >= ends[:-1] - 1e-9)
    from shaper.core.shape import ModelShape
    from shaper.core.work import WorkCoefficients
    from shaper.fitting import fit_recording

    shape = ModelShape.from_hf_config(recording.meta["model_config"])
    fit = fit_recording(recording, profile, WorkCoefficients.from_shape(shape))
    parameters = {one.name: one for one in fit.parameters}
    assert parameters["memory.gemm_ratio"].identified
    assert fit.profile.memory.gemm_ratio == pytest.approx(profile.memory.gemm_ratio, rel=0.05)
