"""The published measurements: targets, the current document, and the assumed load."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from bench import fidelity
from bench.published.rows import kernel_times, meter_recording, serving_rows
from bench.published.serving_fit import Assumptions, Prior, fit_serving, predict_rows, replaced
from bench.published.steady_state import POINTS, ServingLoad, batches, steady_state
from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import StepBatch
from shaper.emulator.shapes import load_shape
from shaper.errors import TraceError
from shaper.gpu.profiles import load_profile

HEADER = (
    "gpu_model,model_id,nickname,task,num_gpus,tensor_parallel,weight_precision,max_num_seqs,"
    "avg_batch_size,avg_output_len,median_itl_ms,p90_itl_ms,p95_itl_ms,p99_itl_ms,"
    "output_throughput_tokens_per_sec,power_per_gpu_w,energy_per_token_joules"
)
ROW = (
    "H100,meta-llama/Llama-3.1-8B-Instruct,x,lm-arena-chat,1,1,bfloat16,8,8,400,7.3,7.7,8,10,"
    "1000,480,0.4"
)


def model(gpu: str = "h100-sxm", name: str = "llama-3.1-8b") -> StepModel:
    return StepModel(load_profile(gpu), WorkCoefficients.from_shape(load_shape(name)))


def published(tmp_path: Path, *rows: str) -> Path:
    (tmp_path / "power").mkdir()
    path = tmp_path / "power" / "mlenergy_v3_serving_power.csv"
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def whole() -> fidelity.Report:
    """The report over all the published files."""
    return fidelity.report()


@pytest.mark.needs_shared
def test_the_targets_are_met(whole: fidelity.Report) -> None:
    """Power and latency by GPU, and kernel times, are within what the project promises."""
    for gpu, (power_target, itl_target) in fidelity.TARGETS.items():
        itl, watts = whole.serving[gpu]
        assert watts <= power_target, gpu
        assert itl <= itl_target, gpu
    for kind, error in whole.kernels.items():
        assert error <= fidelity.KERNEL_TARGET, kind


@pytest.mark.needs_shared
def test_the_document_is_current(whole: fidelity.Report) -> None:
    """docs/fidelity.md says what the command says, held-out fits apart."""
    written = fidelity.DOCUMENT.read_text()
    head, held_out = fidelity.split_document(written)
    assert head == whole.text, "run python -m bench.fidelity --write"
    assert held_out.startswith(fidelity.HELD_OUT_TITLE)


@pytest.mark.needs_shared
def test_no_parameter_belongs_to_one_model() -> None:
    """A profile has no key that names a model: the same numbers serve all of them."""
    rows, left_out = serving_rows()
    assert len({row.model for row in rows}) == 5
    assert not left_out
    points = predict_rows(rows[:3], load_profile("h100-sxm"))
    again = predict_rows(rows[:3], load_profile("h100-sxm"))
    assert points == again


@pytest.mark.needs_shared
def test_the_recorded_card_is_followed(shared_data: Path) -> None:
    """The emulated meter, heat and clock stay close to those of the recorded A100."""
    from bench.published.meter_check import check_meter

    found = check_meter(meter_recording(shared_data), load_profile("a100-sxm-80gb"))
    assert abs(found.gain - 1.0) < 0.05
    assert found.median_error_watts < 2.0
    assert abs(found.rise_error_seconds) < 0.1
    assert found.loop_watts_error_ratio < 0.02
    assert found.celsius_rms < 1.0
    assert found.clock_hertz == found.recorded_clock_hertz
    assert not found.reasons


@pytest.mark.needs_shared
def test_kernel_laws_are_those_of_the_step_model() -> None:
    """The arrays of the calibration and the step model's own GEMM give the same seconds."""
    from bench.studies.calibrate import gemm_seconds

    step_model = model()
    for gemm in step_model.coefficients.gemms:
        for rows in (1, 64, 1000):
            columns = np.array([[rows, gemm.outputs, gemm.inputs]], dtype=np.float64)
            assert gemm_seconds(step_model.profile, columns)[0] == pytest.approx(
                step_model.gemm_seconds(gemm, rows)
            )


@pytest.mark.needs_shared
def test_kernels_of_an_unmeasured_gpu_are_refused() -> None:
    """There are no kernel times of every GPU."""
    with pytest.raises(TraceError, match="no gemm kernel times of l40s"):
        kernel_times(load_profile("l40s"), "gemm")


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the published files the command says what is missing, and exits with 2."""
    assert fidelity.main(["--data", str(tmp_path)]) == 2
    assert "mlenergy_v3_serving_power.csv is missing" in capsys.readouterr().err


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    """The message says which line."""
    data = published(tmp_path, ROW, ROW.replace("480", "many"))
    with pytest.raises(TraceError, match="line 3"):
        serving_rows(data)


def test_rows_that_can_not_be_predicted_are_listed(tmp_path: Path) -> None:
    """Unknown models and other precisions are left out by name; a config brings one in."""
    data = published(
        tmp_path,
        ROW,
        ROW.replace("meta-llama/Llama-3.1-8B-Instruct", "org/new"),
        ROW.replace("bfloat16", "fp8"),
    )
    rows, left_out = serving_rows(data)
    assert len(rows) == 1
    assert len(left_out) == 2
    rows, left_out = serving_rows(data, {"org/new": "qwen3-14b"})
    assert [row.model for row in rows] == ["llama-3.1-8b", "qwen3-14b"]
    assert len(left_out) == 1


def test_the_columns_are_read_in_their_units(tmp_path: Path) -> None:
    """Milliseconds become seconds, and the rest stays."""
    (row,), _ = serving_rows(published(tmp_path, ROW))
    assert row.median_itl_seconds == pytest.approx(0.0073)
    assert row.mean_itl_seconds == pytest.approx(0.008)
    assert row.watts_per_gpu == 480.0
    assert row.gpu == "h100-sxm"
    with (tmp_path / "power" / "mlenergy_v3_serving_power.csv").open() as file:
        assert len(next(csv.reader(file))) == 17


def test_new_prompts_come_as_fast_as_old_ones_leave() -> None:
    """On average a step prefills B / N requests of P tokens."""
    load = ServingLoad(64.0, 400.0, 430.0, prompt_sigma=0.5, step_token_budget=100_000)
    steps = batches(load)
    assert len(steps) == POINTS
    tokens = sum(step.prefill_tokens for step in steps) / POINTS
    assert tokens == pytest.approx(64 / 400 * 430, rel=0.05)
    assert all(step.decode_requests == 64 for step in steps)
    assert steps[0].decode_context_tokens == 64 * 630


def test_full_steps_hold_fewer_decodes() -> None:
    """A step never computes more tokens than the budget."""
    steps = batches(ServingLoad(5000.0, 300.0, 400.0, step_token_budget=2048))
    assert all(step.tokens <= 2048 for step in steps)
    assert steps[0].decode_requests == round(2048 / (1 + 400 / 300))


def test_the_limit_binds_in_steady_state() -> None:
    """Under a low power limit the clock falls, power meets the limit and latency rises."""
    load = ServingLoad(256.0, 400.0, 430.0)
    free = steady_state(model(), load)
    low = replaced(load_profile("h100-sxm"), {"power.limit_watts": 450.0})
    capped = steady_state(
        StepModel(low, WorkCoefficients.from_shape(load_shape("llama-3.1-8b"))), load
    )
    assert free.watts_per_gpu > 550.0
    assert 430.0 < capped.watts_per_gpu <= 450.0
    assert capped.sm_clock_hertz < free.sm_clock_hertz
    assert capped.median_itl_seconds > free.median_itl_seconds


def test_a_fit_finds_what_made_the_rows(tmp_path: Path) -> None:
    """Rows that the model made itself give back the parameters that made them."""
    import dataclasses

    data = published(
        tmp_path, *(ROW.replace(",8,8,400", f",8,{size},400") for size in (4, 16, 64, 128, 256))
    )
    rows, _ = serving_rows(data)
    profile = load_profile("h100-sxm")
    true = {"power.joules_per_byte": 1.3e-10, "kernel.layer_seconds": 2.0e-5}
    made = [
        dataclasses.replace(
            row,
            median_itl_seconds=point.median_itl_seconds,
            output_tokens_per_second=row.requests / point.mean_itl_seconds,
            watts_per_gpu=point.watts_per_gpu,
        )
        for row, point in zip(rows, predict_rows(rows, replaced(profile, true)), strict=True)
    ]
    priors = {
        "power.joules_per_byte": Prior(1e-10, 5.0, 1e-11, 1e-9),
        "kernel.layer_seconds": Prior(1e-5, 5.0, 1e-6, 1e-4),
    }
    found = fit_serving(made, profile, priors, Assumptions())
    for name, value in true.items():
        assert found[name] == pytest.approx(value, rel=0.02), name


def test_an_empty_load_is_a_step_of_one() -> None:
    """The smallest load still decodes."""
    assert batches(ServingLoad(0.2, 100.0, 10.0))[0].decode_requests == 1
    assert isinstance(batches(ServingLoad(1.0, 100.0, 10.0))[-1], StepBatch)
