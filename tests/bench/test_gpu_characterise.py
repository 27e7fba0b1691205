"""`bench.gpu_characterise` as it is run: bad input, a fake driver, interrupts, vLLM's engine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest

from bench import gpu_characterise
from bench.characterise import engine, kernels
from bench.characterise.plan import QUICK, STAGES
from shaper.core.types import StepBatch
from shaper.gpu import nvml_driver
from shaper.gpu.profiles import load_profile
from shaper.recording.format import read_recording
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
    missing = FakeNvml([], init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(nvml_driver, "pynvml", missing)
    assert run("--out", str(tmp_path / "a")) == 2
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    monkeypatch.setattr(nvml_driver, "pynvml", FakeNvml([FakeGpu("GPU-a")]))
    quick = ("--idle-seconds", "0.05", "--torch-only")
    assert run("--out", str(tmp_path / "b"), *quick) == 2
    error = capsys.readouterr().err
    assert "NVIDIA driver" in error
    assert "--torch-only needs CUDA" in error


def test_without_a_binding_vllm_s_copy_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And without that the message says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(engine, "set_environment", lambda emulate: None)
    copy = FakeNvml([FakeGpu("GPU-a")])
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "vllm.third_party", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "vllm.third_party.pynvml", copy)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(nvml_driver, "pynvml", copy)
    quick = ("--stage", "idle", "--idle-seconds", "0.05", "--out", str(tmp_path))
    assert run(*quick) == 0
    assert id(sys.modules["pynvml"]) == id(copy)
    monkeypatch.setitem(sys.modules, "vllm.third_party.pynvml", None)
    assert run(*quick) == 2
    assert "pip install nvidia-ml-py" in capsys.readouterr().err


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

    def _field_value(self, index: int, number: int, scope: int) -> SimpleNamespace:
        if number == pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
            missing = pynvml.NVML_ERROR_NOT_SUPPORTED
            return SimpleNamespace(fieldId=number, nvmlReturn=missing)
        return super()._field_value(index, number, scope)

    def _get(self, name: str, handle: Any, *arguments: int) -> Any:
        if name == "nvmlDeviceGetTotalEnergyConsumption":
            (device,) = self.devices
            device.energy_millijoules = (device.energy_millijoules or 0) + 6_000
        return super()._get(name, handle, *arguments)


def small_model(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
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
    pytest.importorskip("torch")
    fake = CountingNvml(FakeGpu("GPU-a"))
    monkeypatch.setattr(nvml_driver, "pynvml", fake)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    on_cpu = partial(kernels.TorchSteps, device="cpu", kv_tokens=40_000, largest_chunk=2048)
    monkeypatch.setattr(kernels, "TorchSteps", on_cpu)
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
    errors = {cost["name"]: cost["error"] for cost in found["findings"]["reads"]}
    assert not errors["a whole sample"]
    assert not errors["nvmlDeviceGetTotalEnergyConsumption"]
    assert "Not Supported" in errors["field TOTAL_ENERGY_CONSUMPTION"]
    assert len(found["findings"]["reads_under_load"]) == len(errors)
    recording = read_recording(next(out.glob("recording.*")))
    assert {step.batch.prefill_tokens for step in recording.steps} >= set(QUICK.chunks_tokens)


def test_reading_needs_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Idle and reads alone run nothing on the GPU, and write files of their own."""
    fake = CountingNvml(FakeGpu("GPU-a"))
    monkeypatch.setattr(nvml_driver, "pynvml", fake)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    quick = ("--out", str(tmp_path), "--quick", "--idle-seconds", "0.2")
    assert run("--stage", "idle", *quick) == 0
    assert run("--stage", "reads", *quick) == 0
    (idle,) = results(tmp_path, "-idle")["points"]
    assert idle["watts"] > 0
    assert idle["steps"] == 0
    assert results(tmp_path, "-reads")["findings"]["reads"]
    assert fake.open_count == 0


def test_an_engine_that_does_not_start_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It names the cause and what to try; what was measured before is kept."""
    pytest.importorskip("vllm")

    def broken(settings: engine.EngineSettings) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(engine, "set_environment", lambda emulate: None)
    monkeypatch.setattr(engine, "_start", broken)
    monkeypatch.setattr(nvml_driver, "pynvml", CountingNvml(FakeGpu("GPU-a")))
    assert run("--out", str(tmp_path), "--idle-seconds", "0.1") == 2
    error = capsys.readouterr().err
    assert "no kernel image" in error
    assert "--torch-only" in error
    assert error.count("\n") == 1
    assert [point["stage"] for point in results(tmp_path)["points"]] == ["idle"]


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


@pytest.mark.cpu_engine
def test_the_real_model_runner_runs_exact_steps(tmp_path: Path) -> None:
    """vLLM on the CPU, with a real KV and prefix cache: each batch, chunk and context is exact."""
    pytest.importorskip("vllm")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SHAPER", "VLLM"))}
    model = small_model(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.real_steps", str(model)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    contexts = [step["decode_context_tokens"] for step in found["decodes"]]
    assert [step["decode_requests"] for step in found["decodes"]] == [4] * 5
    assert np.diff(contexts).tolist() == [4] * 4
    assert [step["prefill_tokens"] for step in found["chunks"]] == [128] * 6
    assert [step["prefill_context_tokens"] for step in found["chunks"]] == [384] * 6
    assert found["left"] is False


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
    from shaper.core.model.shape import ModelShape
    from shaper.core.model.work import WorkCoefficients
    from shaper.fitting import fit_recording

    shape = ModelShape.from_hf_config(recording.meta["model_config"])
    fit = fit_recording(recording, profile, WorkCoefficients.from_shape(shape))
    parameters = {one.name: one for one in fit.parameters}
    assert parameters["memory.gemm_ratio"].identified
    assert fit.profile.memory.gemm_ratio == pytest.approx(profile.memory.gemm_ratio, rel=0.05)
