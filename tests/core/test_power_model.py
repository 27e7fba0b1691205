"""Seconds and joules of a step: each law against a hand calculation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.model.power_model import GpuProfile, StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import StepBatch
from shaper.emulator.shapes import known_models, load_shape
from shaper.gpu.profiles import known_profiles, load_profile


def changed(profile: GpuProfile, **values: float) -> GpuProfile:
    """The profile with `group__key=value` replaced."""
    groups: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, key = name.split("__")
        groups.setdefault(group, {})[key] = value
    parts: dict[str, Any] = {
        group: dataclasses.replace(getattr(profile, group), **keys)
        for group, keys in groups.items()
    }
    return dataclasses.replace(profile, **parts)


def bare(**values: float) -> GpuProfile:
    """A GPU of round numbers on which every overhead is zero unless given."""
    zero: dict[str, float] = {
        "memory__bandwidth_bytes_per_second": 1e12,
        "memory__gemm_ratio": 1.0,
        "memory__attention_ratio": 1.0,
        "memory__activation_ratio": 0.0,
        "memory__clock_knee_ratio": 0.5,
        "compute__flops_per_second": 1e15,
        "compute__gemm_ratio": 1.0,
        "compute__attention_ratio": 1.0,
        "compute__attention_tile_tokens": 0.0,
        "host__step_seconds": 0.0,
        "host__request_seconds": 0.0,
        "host__prefill_seconds": 0.0,
        "host__returned_request_seconds": 0.0,
        "host__overlap_ratio": 0.0,
        "link__allreduce_seconds": 0.0,
        "link__allreduce_gpu_seconds": 0.0,
        "power__gap_watts": 120.0,
        "power__active_watts": 0.0,
        "power__joules_per_byte": 0.0,
        "power__joules_per_kv_byte": 0.0,
        "power__joules_per_flop": 0.0,
        "power__sampler_watts": 0.0,
        "power__byte_core_ratio": 0.0,
        "power__leakage_watts_per_celsius": 0.0,
        "clocks__voltage_floor_ratio": 0.1,
        "clocks__voltage_slope": 1.0,
    }
    kernels = {
        f"kernel__{field.name}": 0.0
        for field in dataclasses.fields(load_profile("h100-sxm").kernel)
    }
    return changed(load_profile("h100-sxm"), **{**zero, **kernels, **values})


def model(profile: GpuProfile, name: str = "llama-3.1-8b", tensor_parallel: int = 1) -> StepModel:
    return StepModel(profile, WorkCoefficients.from_shape(load_shape(name), tensor_parallel))


def decode(requests: int, context: int, returned: int = 0) -> StepBatch:
    return StepBatch(
        decode_requests=requests,
        decode_tokens=requests,
        decode_context_tokens=requests * context,
        returned_requests=returned,
    )


def prefill(tokens: int) -> StepBatch:
    return StepBatch(
        prefill_requests=1,
        prefill_tokens=tokens,
        prefill_context_tokens=tokens,
        prefill_token_context_product=tokens * tokens,
        prefill_squared_tokens=tokens * tokens,
    )


def test_a_small_batch_reads_weights_and_kv() -> None:
    """At batch 1 the seconds are bytes over bandwidth."""
    gpu = model(bare())
    work = gpu.coefficients.work(decode(1, 1000))
    expected = (work.weight_bytes + work.kv_bytes) / 1e12
    assert gpu.predict(decode(1, 1000)).seconds == pytest.approx(expected, rel=0.01)


def test_a_long_prefill_computes() -> None:
    """At 8,192 tokens and with memory out of the way the seconds are FLOPs over rate."""
    gpu = model(bare(memory__bandwidth_bytes_per_second=1e15))
    work = gpu.coefficients.work(prefill(8192))
    assert gpu.predict(prefill(8192)).seconds == pytest.approx(work.flops / 1e15, rel=0.02)


def test_the_kernels_between_move_activations() -> None:
    """Norms, residuals and activation move ten hidden rows and three of the feed-forward
    width per layer and token."""
    gpu = model(bare())
    fast = model(bare(memory__bandwidth_bytes_per_second=1e30))
    expected = 100 * (10 * 4096 + 3 * 14336) * 32 * 2 / 1e12
    overhead = {
        name: next(
            term.seconds
            for term in one.breakdown(prefill(100)).terms
            if term.name == "kernel overhead"
        )
        for name, one in (("real", gpu), ("fast", fast))
    }
    assert overhead["real"] - overhead["fast"] == pytest.approx(expected)


def test_where_both_are_equal_the_step_takes_a_fifth_more() -> None:
    """norm4 of two equal times is 2^(1/4) of one."""
    gpu = model(bare())
    gemm = gpu.coefficients.gemms[0]
    rows = 1000  # 2 bytes a weight at 1 TB/s take as long as 2 FLOPs a row at 1 PFLOP/s
    expected = 2**0.25 * 2 * gemm.outputs * gemm.inputs / 1e12
    assert gpu.gemm_seconds(gemm, rows) == pytest.approx(expected)


def test_overheads_are_counted_per_gemm_layer_and_step() -> None:
    """Llama-3.1-8B has 4 GEMMs in each of 32 layers and one for the logits."""
    plain = model(bare()).predict(decode(1, 10)).seconds
    values = {"kernel__gemm_seconds": 1e-6, "kernel__attention_seconds": 2e-6}
    values |= {"kernel__layer_seconds": 3e-6, "kernel__step_seconds": 4e-6}
    slower = model(bare(**values)).predict(decode(1, 10)).seconds
    assert slower - plain == pytest.approx((4 * 32 + 1) * 1e-6 + 32 * 5e-6 + 4e-6)


def test_sampler_costs_each_row_its_vocabulary() -> None:
    """Decodes sample every row; a prefill samples one."""
    quiet, busy = model(bare()), model(bare(kernel__sampler_seconds_per_logit=1e-9))
    for batch, rows in ((decode(5, 10), 5), (prefill(512), 1)):
        extra = busy.predict(batch).seconds - quiet.predict(batch).seconds
        assert extra == pytest.approx(rows * 128_256 * 1e-9)


def test_host_time_is_serial_or_hidden() -> None:
    """Serial host time is added; hidden host time shows only where it outlasts the GPU."""
    device = model(bare()).predict(decode(4, 10)).seconds
    host = {"host__step_seconds": 1e-3, "host__request_seconds": 1e-4}
    serial = model(bare(**host)).predict(decode(4, 10)).seconds
    assert serial == pytest.approx(device + 1.4e-3)
    hidden = model(bare(**host, host__overlap_ratio=1.0)).predict(decode(4, 10)).seconds
    assert hidden == pytest.approx(device)
    slow = model(bare(host__step_seconds=0.1, host__overlap_ratio=1.0))
    assert slow.predict(decode(4, 10)).seconds == pytest.approx(0.1)


def test_prefills_and_returned_requests_cost_host_time() -> None:
    """A step with a prefill, and each request that comes back, add what the profile says."""
    gpu = model(bare(host__prefill_seconds=1e-3, host__returned_request_seconds=1e-4))
    free = model(bare())
    extra = gpu.predict(prefill(64)).seconds - free.predict(prefill(64)).seconds
    assert extra == pytest.approx(1e-3)
    back = gpu.predict(decode(8, 10, returned=3)).seconds - gpu.predict(decode(8, 10)).seconds
    assert back == pytest.approx(3e-4)


def test_joules_by_hand() -> None:
    """Power while it lasts, plus joules per byte, per KV byte and per FLOP."""
    values = {"power__active_watts": 80.0, "power__joules_per_byte": 1e-10}
    values |= {"power__joules_per_kv_byte": 2e-10, "power__joules_per_flop": 1e-12}
    gpu = model(bare(**values, host__step_seconds=1e-3))
    found = gpu.predict(decode(16, 500))
    work = gpu.coefficients.work(decode(16, 500))
    expected = (
        120.0 * found.seconds
        + 80.0 * (found.seconds - 1e-3)
        + 1e-10 * work.weight_bytes
        + 2e-10 * work.kv_bytes
        + 1e-12 * work.flops
    )
    assert found.joules == pytest.approx(expected)


def test_lower_clock_by_hand() -> None:
    """At half the clock compute takes twice as long and a FLOP a quarter of the energy,
    when the voltage goes with the clock."""
    values = {"power__joules_per_flop": 1e-12, "power__active_watts": 80.0}
    gpu = model(bare(**values, memory__bandwidth_bytes_per_second=1e15))
    half = gpu.profile.clocks.sm_max_hertz / 2
    fast, slow = gpu.predict(prefill(8192)), gpu.predict(prefill(8192), sm_clock_hertz=half)
    assert slow.seconds == pytest.approx(2 * fast.seconds, rel=0.01)
    flops = gpu.coefficients.work(prefill(8192)).flops
    expected = (120.0 + 80.0 * 0.5 * 0.25) * slow.seconds + 0.25e-12 * flops
    assert slow.joules == pytest.approx(expected)


def test_memory_does_not_slow_down_above_the_knee() -> None:
    """Bandwidth holds down to the knee and falls in proportion below it."""
    gpu = model(bare())
    top = gpu.profile.clocks.sm_max_hertz
    seconds = {
        ratio: gpu.predict(decode(1, 10), sm_clock_hertz=top * ratio).seconds
        for ratio in (1.0, 0.5, 0.25)
    }
    assert seconds[0.5] == pytest.approx(seconds[1.0], rel=0.01)
    assert seconds[0.25] == pytest.approx(2 * seconds[1.0], rel=0.01)


def test_voltage_stops_at_its_floor() -> None:
    """The voltage falls with the slope and no further than the floor."""
    gpu = model(bare(clocks__voltage_slope=0.8, clocks__voltage_floor_ratio=0.7))
    assert gpu.voltage_ratio(1.0) == 1.0
    assert gpu.voltage_ratio(0.9) == pytest.approx(0.92)
    assert gpu.voltage_ratio(0.3) == pytest.approx(0.7)


def test_leakage_by_hand() -> None:
    """Ten degrees above the reference cost ten times the leakage coefficient."""
    gpu = model(bare(power__leakage_watts_per_celsius=0.5, power__reference_celsius=60.0))
    cold = gpu.predict(decode(1, 10))
    hot = gpu.predict(decode(1, 10), temperature_celsius=70.0)
    assert hot.joules - cold.joules == pytest.approx(5.0 * cold.seconds)


def test_tensor_parallel_by_hand() -> None:
    """Two all-reduces a layer, each with its latency and 2 (tp - 1) / tp of the tokens."""
    free = model(bare(), tensor_parallel=4)
    values = {"link__allreduce_seconds": 1e-5, "link__allreduce_gpu_seconds": 1e-6}
    gpu = model(bare(**values, link__bandwidth_bytes_per_second=1e11), tensor_parallel=4)
    free_link = changed(free.profile, link__bandwidth_bytes_per_second=1e30)
    none = model(free_link, tensor_parallel=4).predict(decode(10, 10)).seconds
    expected = 2 * 32 * (1e-5 + 2e-6 + 10 * 4096 * 2 * 1.5 / 1e11)
    assert gpu.predict(decode(10, 10)).seconds - none == pytest.approx(expected)


def test_joules_count_all_gpus() -> None:
    """Four idle GPUs draw four times the power of one."""
    gpu = model(load_profile("h100-sxm"), "llama-3.1-70b", 4)
    assert gpu.gpu_count == 4
    assert gpu.idle_watts == 4 * gpu.profile.power.context_watts
    assert gpu.gap_watts == 4 * gpu.profile.power.gap_watts


def test_an_empty_step_is_a_gap() -> None:
    """Nothing to compute: the host's time at the power between steps."""
    gpu = model(load_profile("h200-sxm"))
    found = gpu.predict(StepBatch())
    assert found.seconds == gpu.profile.host.step_seconds
    assert found.joules == pytest.approx(found.seconds * gpu.gap_watts)


@pytest.mark.parametrize("gpu", known_profiles())
@pytest.mark.parametrize("name", known_models())
def test_the_terms_add_up(gpu: str, name: str) -> None:
    """An explanation's seconds and joules are those of the prediction, on any GPU."""
    predictor = model(load_profile(gpu), name, 4)
    clock = predictor.profile.clocks.sm_max_hertz * 0.8
    for batch in (decode(64, 900), prefill(1000), StepBatch()):
        explained = predictor.breakdown(batch, sm_clock_hertz=clock, temperature_celsius=80.0)
        whole = explained.prediction
        assert sum(term.seconds for term in explained.terms) == pytest.approx(whole.seconds)
        assert sum(term.joules for term in explained.terms) == pytest.approx(whole.joules)
        assert all(term.seconds >= -1e-12 for term in explained.terms)


def test_what_binds() -> None:
    """Decodes of a small batch wait for memory, a prefill computes, nothing waits for the host."""
    gpu = model(load_profile("h100-sxm"), "llama-3.1-8b")
    assert gpu.breakdown(decode(8, 500)).bound_by == "memory"
    assert gpu.breakdown(prefill(4096)).bound_by == "compute"
    assert gpu.breakdown(StepBatch()).bound_by == "host"


@pytest.mark.parametrize("gpu", known_profiles())
def test_what_the_design_says_of_power(gpu: str) -> None:
    """A long prefill comes near the limit or above it, and takes more than any decode."""
    predictor = model(load_profile(gpu))
    limit = predictor.profile.power.limit_watts
    assert predictor.predict(prefill(8192)).watts > 0.8 * limit
    small = predictor.predict(decode(8, 700)).watts
    assert 0.4 * limit < small < 0.8 * limit


@given(
    requests=st.integers(1, 512),
    context=st.integers(1, 8000),
    more=st.integers(1, 64),
    ratio=st.floats(0.2, 1.0),
)
def test_more_work_takes_longer(requests: int, context: int, more: int, ratio: float) -> None:
    """More requests, more context or a lower clock never make a step shorter."""
    gpu = model(load_profile("h100-sxm"))
    top = gpu.profile.clocks.sm_max_hertz
    base = gpu.predict(decode(requests, context))
    assert gpu.predict(decode(requests + more, context)).seconds > base.seconds
    assert gpu.predict(decode(requests, context + more)).seconds > base.seconds
    assert gpu.predict(decode(requests, context), sm_clock_hertz=top * ratio).seconds >= (
        base.seconds * (1 - 1e-12)
    )


@given(tokens=st.integers(256, 8192), share=st.floats(0.4, 1.0))
def test_the_clock_under_a_limit_keeps_it(tokens: int, share: float) -> None:
    """At the clock that is found the power is below the limit, and one step up it is not."""
    gpu = model(load_profile("h100-sxm"))
    limit = share * gpu.predict(prefill(tokens)).watts
    clock = gpu.clock_under_limit([prefill(tokens)], limit)
    if clock > gpu.profile.clocks.sm_min_hertz:
        assert gpu.mean_watts([prefill(tokens)], clock) <= limit * (1 + 1e-9)
    if clock < gpu.profile.clocks.sm_max_hertz:
        above = clock + gpu.profile.clocks.step_hertz
        assert gpu.mean_watts([prefill(tokens)], above) > limit


def test_wrong_tensor_parallel_is_refused() -> None:
    """Coefficients of one GPU can't be used for two."""
    coefficients = WorkCoefficients.from_shape(load_shape("llama-3.1-8b"), 1)
    with pytest.raises(ValueError, match="coefficients are for 1"):
        StepModel(load_profile("h100-sxm"), coefficients, 2)
