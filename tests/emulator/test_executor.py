"""The executor and the device under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shaper.core.types import StepBatch
from shaper.emulator import device as device_module
from shaper.emulator.device import EmulatedDevice, trace_path
from shaper.emulator.host import ProcessorWait, sleep_until
from shaper.emulator.shapes import load_model_config, load_shape
from shaper.emulator.trace import read_power_trace
from shaper.errors import ConfigError, UnknownGpuError
from tests.emulator.test_batching import scheduled

DECODE = StepBatch(decode_requests=1, decode_tokens=1, decode_context_tokens=100)
LONG = StepBatch(
    prefill_requests=1,
    prefill_tokens=200_000,
    prefill_context_tokens=200_000,
    prefill_token_context_product=200_000**2,
    prefill_squared_tokens=200_000**2,
)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[EmulatedDevice]:
    made = EmulatedDevice("h200-sxm", load_shape("llama-3.1-8b"), trace_prefix=str(tmp_path / "t"))
    made.start()
    yield made
    made.close()


def test_a_step_is_waited_for(device: EmulatedDevice) -> None:
    """Steps run one after the other, and a wait returns no earlier than the end."""
    first, second = device.launch(DECODE), device.launch(DECODE)
    assert second.start_seconds == first.end_seconds
    assert not device.ended(second)
    device.wait(second)
    assert time.monotonic() >= second.end_seconds
    assert device.ended(first)
    assert device.take_runs() == [first, second]
    assert device.take_runs() == []


def test_without_modelled_delay_nothing_is_waited_for() -> None:
    """A step of many seconds ends at once."""
    fast = EmulatedDevice("l40s", load_shape("llama-3.1-8b"), real_time=False)
    run = fast.launch(LONG)
    fast.wait(run)
    assert fast.ended(run)
    assert time.monotonic() < run.end_seconds


def test_the_trace_holds_the_true_energy(device: EmulatedDevice, tmp_path: Path) -> None:
    """From the start to the end, gaps included, with no hole; a second close is harmless."""
    run = device.launch(DECODE)
    device.wait(run)
    device.close()
    device.close()
    trace = read_power_trace(trace_path(str(tmp_path / "t"), 0))
    assert np.allclose(trace.segments[1:, 0], trace.segments[:-1, 1])
    assert trace.start_seconds < run.start_seconds
    assert trace.end_seconds >= run.end_seconds
    assert trace.joules_between(run.start_seconds, run.end_seconds) == pytest.approx(run.joules)


def test_the_trace_is_written_while_the_engine_idles(
    device: EmulatedDevice, tmp_path: Path
) -> None:
    """A process that is killed loses a fraction of a second, not its recording."""
    path = trace_path(str(tmp_path / "t"), 0)
    header = path.stat().st_size
    deadline = time.monotonic() + 60
    while path.stat().st_size == header:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.01)


def test_a_late_wake_up_is_noted(
    device: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 2 ms late is a stall of the host; less is not."""
    monkeypatch.setattr(ProcessorWait, "take_seconds", lambda _: 0.0)
    run = device.launch(DECODE)
    for late_seconds in (0.0019, 0.0301):
        monkeypatch.setattr(device_module, "sleep_until", lambda _, late=late_seconds: late)
        device.wait(run)
    # Held up before it came to wait, or before a launch.
    monkeypatch.setattr(ProcessorWait, "take_seconds", lambda _: 0.0302)
    device.wait(run)
    device.launch(DECODE)
    assert device.stalls == 3
    monkeypatch.setattr(ProcessorWait, "take_seconds", lambda _: 0.0)
    device.wait(device.launch(DECODE))
    device.close()
    stalls = read_power_trace(trace_path(str(tmp_path / "t"), 0)).stalls
    assert [stall.late_seconds for stall in stalls[:3]] == [0.0301, 0.0302, 0.0302]
    assert stalls[0].at_seconds == stalls[1].at_seconds == run.end_seconds


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this kernel does not count it"
)
def test_waiting_for_a_processor_is_counted() -> None:
    """With more busy processes than processors a busy thread is held up."""
    wait = ProcessorWait()
    assert wait.take_seconds() == 0.0
    count = 2 * (os.cpu_count() or 1)
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    hogs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for hog in hogs:
            assert hog.stdout is not None
            hog.stdout.readline()
        deadline = time.monotonic() + 60
        waited_seconds = 0.0
        while waited_seconds < 0.002:
            assert time.monotonic() < deadline, "never held up"
            sum(range(10_000))
            waited_seconds += wait.take_seconds()
    finally:
        for hog in hogs:
            hog.kill()
            hog.communicate()
    wait.close()
    wait.close()


def test_sleeping_never_ends_early() -> None:
    """And what has passed already is not waited for, nor late."""
    for wait_seconds in (0.0, 0.00005, 0.003):
        deadline = time.monotonic() + wait_seconds
        late_seconds = sleep_until(deadline)
        assert time.monotonic() >= deadline
        assert late_seconds >= 0.0
    assert sleep_until(time.monotonic() - 5.0) == 0.0


def test_the_meter_reads_every_gpu() -> None:
    """One sample for each GPU of a tensor-parallel engine."""
    four = EmulatedDevice("h100-sxm", load_shape("llama-3.1-70b"), tensor_parallel=4)
    samples = four.reader.read()
    assert [sample.gpu_index for sample in samples] == [0, 1, 2, 3]
    assert all(sample.instant_watts for sample in samples)


def test_what_can_not_be_emulated_is_refused() -> None:
    """An unknown GPU, and a tensor-parallel size that does not divide the heads."""
    with pytest.raises(UnknownGpuError, match="h200-sxm"):
        EmulatedDevice("h300", load_shape("llama-3.1-8b"))
    with pytest.raises(ConfigError, match="3 does not divide"):
        EmulatedDevice("h200-sxm", load_shape("llama-3.1-8b"), tensor_parallel=3)


# The executor. vLLM's own classes are not needed to call it: it reads by attribute.


def vllm_config(**changes: Any) -> Any:
    config = load_model_config("llama-3.1-8b")
    values: dict[str, Any] = {
        "model_config": SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: config),
            hf_text_config=SimpleNamespace(**config),
            max_model_len=1000,
            runner_type="generate",
            dtype="bfloat16",
            get_vocab_size=lambda: config["vocab_size"],
        ),
        "parallel_config": SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_rank=0
        ),
        "cache_config": SimpleNamespace(
            gpu_memory_utilization=0.9, block_size=16, cache_dtype="auto"
        ),
        "scheduler_config": SimpleNamespace(max_num_batched_tokens=8192),
        "speculative_config": None,
        "lora_config": None,
        "load_config": None,
        "device_config": None,
        "observability_config": None,
    }
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes executors with no modelled delay."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("SHAPER_EMULATE", "h200-sxm")
    monkeypatch.setenv("SHAPER_EMULATE_TIME_SCALE", "0")
    from shaper.emulator.executor import EmulatedExecutor

    return EmulatedExecutor


def run_step(executor: Any, output: Any, grammar: Any = None) -> Any:
    assert executor.execute_model(output, non_block=True).result() is None
    return executor.sample_tokens(grammar, non_block=True).result()


def with_parameters(output: Any, **parameters: Any) -> Any:
    defaults = {
        "max_tokens": 50,
        "eos_token_id": 256,
        "min_tokens": 0,
        "seed": None,
        "num_logprobs": None,
        "prompt_logprobs": None,
    }
    for new in output.scheduled_new_reqs:
        new.sampling_params = SimpleNamespace(**(defaults | parameters))
    return output


def test_a_request_through_the_executor(emulated: Any) -> None:
    """Prefill in two chunks, then decodes; async scheduling may run one step ahead."""
    executor = emulated(vllm_config())
    nothing = run_step(executor, with_parameters(scheduled(new=[("a", 100, 0, 64)])))
    assert nothing.sampled_token_ids == [[]]
    first = executor.execute_model(scheduled(cached=[("a", 64, 36, 0)]), non_block=True)
    first_tokens = executor.sample_tokens(None, non_block=True)
    second = executor.execute_model(scheduled(cached=[("a", 100, 1, 1)]), non_block=True)
    second_tokens = executor.sample_tokens(None, non_block=True)
    assert first.result() is second.result() is None
    tokens = first_tokens.result().sampled_token_ids + second_tokens.result().sampled_token_ids
    assert [len(row) for row in tokens] == [1, 1]
    assert executor.sample_tokens.__self__ is executor
    executor.shutdown()


def test_a_step_without_tokens_is_answered_at_once(emulated: Any) -> None:
    """Blocking or not, with the empty output."""
    executor = emulated(vllm_config())
    assert executor.execute_model(scheduled()).req_ids == []
    assert executor.execute_model(scheduled(), non_block=True).result().req_ids == []


def test_sampling_waits_for_a_deferred_grammar(emulated: Any) -> None:
    """vLLM may launch a step and bring its bitmask later."""
    executor = emulated(vllm_config())
    mask = np.zeros((1, 4008), dtype=np.int32)
    mask[0, 2] = 1 << 3
    assert executor.execute_model(with_parameters(scheduled(new=[("a", 9, 0, 9)]))) is None
    grammar = SimpleNamespace(structured_output_request_ids=["a"], grammar_bitmask=mask)
    assert executor.sample_tokens(grammar).sampled_token_ids == [[67]]


def test_log_probabilities_are_served(emulated: Any) -> None:
    """A row per request, as wide as the widest; prompt rows once, when the prompt is done."""
    executor = emulated(vllm_config())
    output = with_parameters(
        scheduled(new=[("a", 9, 0, 5), ("b", 3, 0, 3)]), num_logprobs=2, prompt_logprobs=1
    )
    result = run_step(executor, output)
    assert result.logprobs.logprobs.shape == (2, 3)
    assert result.logprobs.logprob_token_ids[1, 0] == result.sampled_token_ids[1][0]
    assert list(result.prompt_logprobs_dict) == ["b"]
    assert result.prompt_logprobs_dict["b"].logprob_token_ids[:, 0].tolist() == [1, 2]
    result = run_step(executor, scheduled(cached=[("a", 5, 4, 0), ("b", 3, 1, 1)]))
    assert list(result.prompt_logprobs_dict) == ["a"]
    assert len(result.prompt_logprobs_dict["a"].logprobs) == 8


def test_the_reader_belongs_to_one_config(emulated: Any) -> None:
    """An equal config of another engine has another meter, or none."""
    from shaper.emulator.executor import emulated_reader

    config = vllm_config()
    executor = emulated(config)
    assert emulated_reader(config) is executor.device.reader
    assert emulated_reader(vllm_config()) is None


def test_memory_is_the_profile_s_less_the_weights(emulated: Any) -> None:
    """Twice the GPUs leave more than twice the room each had."""
    one = emulated(vllm_config()).determine_available_memory()[0]
    parallel = SimpleNamespace(
        tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_rank=0
    )
    two = emulated(vllm_config(parallel_config=parallel)).determine_available_memory()[0]
    profile = emulated(vllm_config()).device.profile
    assert 0 < one < profile.memory.capacity_bytes * 0.9
    half_the_weights = load_shape("llama-3.1-8b").weight_bytes / 2
    assert two - one >= half_the_weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "parallel_config": SimpleNamespace(
                    tensor_parallel_size=1, pipeline_parallel_size=2, data_parallel_rank=0
                )
            },
            "pipeline",
        ),
        ({"speculative_config": object()}, "speculative"),
    ],
)
def test_unsupported_features_are_refused(
    emulated: Any, changes: dict[str, Any], message: str
) -> None:
    """With a message that says what to leave out."""
    with pytest.raises(ConfigError, match=message):
        emulated(vllm_config(**changes))


def test_a_wrong_time_scale_is_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only 0 and 1 mean something."""
    monkeypatch.setenv("SHAPER_EMULATE_TIME_SCALE", "2")
    with pytest.raises(ConfigError, match="must be 1"):
        emulated(vllm_config())


def engine_run(**settings: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_run.py")), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def test_tokens_do_not_depend_on_how_steps_are_cut() -> None:
    """vLLM's EngineCore, whole prompts with room against small chunks and preemptions: the
    same tokens, as many as asked for, and nothing left behind."""
    roomy = engine_run()
    tight = engine_run(max_num_batched_tokens=64, blocks=60, async_scheduling=False)
    assert roomy["tokens"] == tight["tokens"]
    assert {name: len(row) for name, row in roomy["tokens"].items()} == roomy["wanted"]
    assert roomy["preemptions"] == 0 < tight["preemptions"]
    for result in (roomy, tight):
        assert result["kv_usage"] == 0
        assert result["tracked"] == 0


def test_sliding_layers_have_block_tables_of_their_own() -> None:
    """A model with sliding windows on two GPUs, under preemption."""
    result = engine_run(model="gemma-3-27b", tensor_parallel_size=2, blocks=400)
    assert result["kv_groups"] > 1
    assert len(result["gpus"]) == 2
    assert {name: len(row) for name, row in result["tokens"].items()} == result["wanted"]
