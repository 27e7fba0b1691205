"""The work of a step: against hand calculations and against vLLM's own counts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.model.work import ModelShape, WorkCoefficients
from shaper.core.types import StepBatch
from shaper.emulator.shapes import known_models, load_model_config, load_shape
from shaper.errors import UnknownModelError

TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 128,
}


def tiny(**changes: Any) -> ModelShape:
    return ModelShape.from_hf_config({**TINY, **changes}, "tiny")


def decode(requests: int, context: int) -> StepBatch:
    return StepBatch(
        decode_requests=requests,
        decode_tokens=requests,
        decode_context_tokens=requests * context,
    )


def prefill(tokens: int, context: int) -> StepBatch:
    return StepBatch(
        prefill_requests=1,
        prefill_tokens=tokens,
        prefill_context_tokens=context,
        prefill_token_context_product=tokens * context,
        prefill_squared_tokens=tokens * tokens,
    )


def test_decode_by_hand() -> None:
    """One decode of a two-layer model does the FLOPs and bytes that paper and pencil give."""
    work = WorkCoefficients.from_shape(tiny()).work(decode(1, 10))
    qkv, output, gate_up, down = 8 * 8 * 2, 8 * 8, 8 * 32, 16 * 8
    per_layer = qkv + output + gate_up + down
    weights = 2 * per_layer + 8 * 32
    assert work.gemm_flops == 2 * weights
    assert work.attention_flops == 2 * 4 * (4 * 2) * 10
    assert work.weight_bytes == 2 * weights
    kv_per_token = 2 * 2 * 2 * 2 * 2  # K and V, layers, heads, dimension, bytes
    assert work.kv_bytes == kv_per_token * (10 + 1)


def test_prefill_attends_half_of_its_square() -> None:
    """A prompt of c tokens attends c (c + 1) / 2 pairs, and a later chunk its context too."""
    coefficients = WorkCoefficients.from_shape(tiny())
    per_pair = 2 * 4 * (4 * 2)
    assert coefficients.work(prefill(6, 6)).attention_flops == per_pair * 21
    later = coefficients.work(prefill(3, 6)).attention_flops
    assert later == per_pair * (4 + 5 + 6)


def test_logits_are_needed_once_per_prefill() -> None:
    """A prefill chunk multiplies the vocabulary matrix for one row, not for each token."""
    coefficients = WorkCoefficients.from_shape(tiny())
    one = coefficients.work(prefill(1, 1)).gemm_flops
    four = coefficients.work(prefill(4, 4)).gemm_flops
    assert four - one == 3 * coefficients.dense_flops_per_token


def test_tensor_parallel_divides_weights_and_kv() -> None:
    """Two GPUs hold half of the weights and half of the KV heads each."""
    one = WorkCoefficients.from_shape(load_shape("llama-3.1-8b"), 1).work(decode(4, 100))
    two = WorkCoefficients.from_shape(load_shape("llama-3.1-8b"), 2).work(decode(4, 100))
    assert two.weight_bytes == pytest.approx(one.weight_bytes / 2)
    assert two.kv_bytes == pytest.approx(one.kv_bytes / 2)
    assert two.flops == pytest.approx(one.flops / 2)


def test_tensor_parallel_that_does_not_divide_is_refused() -> None:
    """Three GPUs can't share 32 heads."""
    with pytest.raises(ValueError, match=r"3 does not divide the 32 attention heads"):
        WorkCoefficients.from_shape(load_shape("llama-3.1-8b"), 3)


def test_experts_touched_by_hand() -> None:
    """One token of a top-2-of-8 model touches 2 experts, two tokens 2 + 2 * 6/8."""
    shape = tiny(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=4)
    coefficients = WorkCoefficients.from_shape(shape)
    assert coefficients.touched_experts(1) == pytest.approx(2.0)
    assert coefficients.touched_experts(2) == pytest.approx(3.5)
    assert coefficients.touched_experts(10_000) == pytest.approx(8.0)
    assert coefficients.expert_weight_bytes == 2 * (3 * 8 * 4) * 2
    work = coefficients.work(decode(2, 5))
    assert work.weight_bytes == coefficients.dense_weight_bytes + 3.5 * 2 * (3 * 8 * 4) * 2


def test_spread_experts_are_shared_out() -> None:
    """With experts over two engines, one GPU reads half of those that both batches touch."""
    shape = load_shape("qwen3-30b-a3b")
    alone = WorkCoefficients.from_shape(shape)
    spread = WorkCoefficients.from_shape(shape, expert_parallel=2)
    assert spread.touched_experts(8) == pytest.approx(alone.touched_experts(16) / 2)


def test_sliding_layers_stop_at_their_window() -> None:
    """Beyond the window a sliding layer's share of attention and KV no longer grows."""
    shape = tiny(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    coefficients = WorkCoefficients.from_shape(shape)
    short, long = coefficients.work(decode(1, 8)), coefficients.work(decode(1, 80))
    per_layer_pair = 4 * 4 * 2
    assert long.attention_flops - short.attention_flops == pytest.approx(72 * per_layer_pair)
    per_layer_token = 2 * 2 * 2 * 2
    assert long.kv_bytes - short.kv_bytes == pytest.approx(72 * per_layer_token)


@given(
    requests=st.integers(1, 64),
    context=st.integers(1, 4096),
    tokens=st.integers(1, 512),
    before=st.integers(0, 4096),
)
def test_work_adds_up(requests: int, context: int, tokens: int, before: int) -> None:
    """A mixed step does the FLOPs of its parts; only the weights are shared."""
    coefficients = WorkCoefficients.from_shape(tiny())
    chunk = prefill(tokens, before + tokens)
    both = StepBatch(
        decode_requests=requests,
        decode_tokens=requests,
        decode_context_tokens=requests * context,
        prefill_requests=1,
        prefill_tokens=chunk.prefill_tokens,
        prefill_context_tokens=chunk.prefill_context_tokens,
        prefill_token_context_product=chunk.prefill_token_context_product,
        prefill_squared_tokens=chunk.prefill_squared_tokens,
    )
    apart = [coefficients.work(part) for part in (decode(requests, context), chunk)]
    mixed = coefficients.work(both)
    assert mixed.flops == pytest.approx(sum(part.flops for part in apart))
    assert mixed.kv_bytes == pytest.approx(sum(part.kv_bytes for part in apart))
    assert mixed.weight_bytes == apart[0].weight_bytes


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("llama-3.1-8b", 8.03, 131_072),
        ("llama-3.1-70b", 70.55, 327_680),
        ("qwen3-8b", 8.19, 147_456),
        ("qwen3-14b", 14.77, 163_840),
        ("qwen3-32b", 32.76, 262_144),
        ("gemma-3-27b", 27.01, 507_904),
        ("qwen3-30b-a3b", 30.53, 98_304),
    ],
)
def test_built_in_shapes_have_their_published_size(
    name: str, billions: float, kv_bytes: int
) -> None:
    """Each built-in shape has the number of parameters that its model card states."""
    shape = load_shape(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert shape.kv_bytes_per_token == kv_bytes
    assert shape.weight_bytes == shape.parameters * 2


def test_nested_text_config_is_read(tmp_path: Path) -> None:
    """A multimodal config's text part is the one that counts."""
    config = {"architectures": ["X"], "text_config": load_model_config("gemma-3-27b")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = load_shape(str(tmp_path))
    assert (shape.layers, shape.sliding_layers, shape.sliding_window_tokens) == (62, 52, 1024)
    assert shape.tied_embeddings


def test_a_window_that_is_turned_off_does_not_count() -> None:
    """Qwen's `use_sliding_window: false` means full attention."""
    shape = tiny(sliding_window=16, use_sliding_window=False)
    assert shape.sliding_window_tokens is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"num_experts": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 4}, "of only 4"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    """The message names the key."""
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_an_unknown_model_lists_the_known_ones() -> None:
    """The message helps to find the right name."""
    with pytest.raises(UnknownModelError, match=r"llama-3\.1-8b"):
        load_shape("llama-4")


@pytest.fixture(scope="module")
def vllm_metrics(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's ModelMetrics of a built-in shape at a tensor-parallel size."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.perf import ModelMetrics

    def build(name: str, tensor_parallel: int) -> Any:
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(load_model_config(name)))
        config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=4096,
            dtype="bfloat16",
        ).create_engine_config()
        config.parallel_config.tensor_parallel_size = tensor_parallel
        return ModelMetrics(config)

    return build


@pytest.mark.parametrize("tensor_parallel", [1, 4])
@pytest.mark.parametrize("name", known_models())
def test_totals_equal_those_of_vllm(vllm_metrics: Any, name: str, tensor_parallel: int) -> None:
    """FLOPs, bytes read and bytes written equal vLLM's on random batches, for each shape."""
    from vllm.v1.metrics.perf import ExecutionContext

    metrics = vllm_metrics(name, tensor_parallel)
    coefficients = WorkCoefficients.from_shape(load_shape(name), tensor_parallel)
    draw = random.Random(f"{name} {tensor_parallel}")
    for _ in range(20):
        requests = [(1, draw.randint(1, 4000), False) for _ in range(draw.randint(0, 40))]
        for _ in range(draw.randint(0 if requests else 1, 4)):
            tokens = draw.randint(1, 2048)
            requests.append((tokens, tokens + draw.randint(0, 2000), True))
        context = ExecutionContext()
        for row in requests:
            context.add(*row)
        totals = coefficients.vllm_totals(requests)
        assert totals.flops == pytest.approx(metrics.get_num_flops(context), rel=1e-9)
        assert totals.read_bytes == pytest.approx(metrics.get_read_bytes(context), rel=1e-9)
        assert totals.write_bytes == pytest.approx(metrics.get_write_bytes(context), rel=1e-9)


DENSE = [
    name
    for name in known_models()
    if not load_shape(name).sliding_layers and not load_shape(name).experts
]


@pytest.mark.parametrize("name", DENSE)
def test_physics_and_vllm_agree_where_their_conventions_do(name: str) -> None:
    """For decodes of a dense model with full attention both counts are one; windows (by mean
    context) and experts (by expectation) are where they differ."""
    shape = load_shape(name)
    coefficients = WorkCoefficients.from_shape(shape)
    rows = [(1, context, False) for context in (10, 500, 3000)]
    batch = StepBatch(
        decode_requests=3, decode_tokens=3, decode_context_tokens=sum(row[1] for row in rows)
    )
    work, totals = coefficients.work(batch), coefficients.vllm_totals(rows)
    assert work.flops == pytest.approx(totals.flops)
    assert work.bytes == pytest.approx(totals.read_bytes + totals.write_bytes)
