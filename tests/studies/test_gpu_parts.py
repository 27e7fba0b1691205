"""The parts of `bench.studies.gpu` that sum up what was measured, by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.studies.gpu.engine import EngineSettings, StepLog, engine_arguments
from bench.studies.gpu.plan import Budget
from bench.studies.gpu.points import Point, between_steps, make_point
from bench.studies.gpu.stages import describe_cap
from shaper.core.types import ClockEventReasons, GpuSample, StepBatch
from shaper.recording.format import RecordedStep

ROOT = Path(__file__).resolve().parents[2]
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
    """140 W between steps and 2 J above it for each step, at three cadences; hot 10 W more."""
    points = [
        Point(
            stage="gap",
            settings={"batch": 16, "cadence_seconds": period},
            when=when,
            seconds=100 * period,
            steps=100,
            watts=(150.0 if when == "hot" else 140.0) + 2.0 / period,
        )
        for when in ("cold", "hot")
        for period in (0.01, 0.02, 0.04)
    ]
    found, hot = between_steps(points)
    assert (found.when, found.batch, hot.when) == ("cold", 16, "hot")
    assert hot.gap_watts == pytest.approx(150.0)
    assert found.gap_watts == pytest.approx(140.0)
    assert found.step_excess_joules == pytest.approx(2.0)
    assert found.error_watts == pytest.approx(0.0, abs=1e-6)
    assert between_steps(points[:1]) == []


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
    found = describe_cap(samples)
    assert found["first_capped_seconds"] == pytest.approx(0.2)
    assert found["capped_ratio"] == pytest.approx(0.8)
    assert found["settled_sm_clock_hertz"] == 1.5e9
    assert found["highest_instant_watts"] == 720.0


def test_time_is_left_for_the_stage_and_for_the_run() -> None:
    """Whichever ends first."""
    now = 0.0
    budget = Budget(100.0, 40.0, lambda: now)
    assert budget.left_seconds == 40.0
    now = 70.0
    assert budget.left_seconds < 0.0
    budget.start_stage()
    assert budget.left_seconds == 30.0


def test_the_engine_is_given_its_attention_backend() -> None:
    """And none by default."""
    named = engine_arguments(EngineSettings(attention_backend="FLASH_ATTN"))
    assert named["attention_backend"] == "FLASH_ATTN"
    assert named["load_format"] == "dummy"
    assert "attention_backend" not in engine_arguments(EngineSettings())


@pytest.mark.cpu_engine
def test_the_real_model_runner_runs_exact_steps(tmp_path: Path) -> None:
    """vLLM on the CPU, with a real KV and prefix cache: each batch, chunk and context is exact."""
    pytest.importorskip("vllm")
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
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "tests.studies.real_steps", str(tmp_path)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith(("SHAPER", "VLLM"))},
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
