"""The engine's coefficients against counts of this file's own, and a limit over quantised weights.

Nothing here is counted by the code under test: sizes are those of Llama 3.1 8B as its
model card has them, and the emulated GPUs run what this file counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.core.model.power_model import StepModel
from shaper.core.model.quantisation import WeightBytes
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import PowerLimit
from shaper.emulator.shapes import load_model_config
from shaper.errors import ConfigError, EngineError
from shaper.gpu.profiles import load_profile
from tests.engine.harness import GPU, worst_ratio

pytest.importorskip("vllm")

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 32, 4096, 32, 8, 128, 14336, 128256
DECODER = LAYERS * (
    WIDTH * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * WIDTH + 3 * WIDTH * FFN
)
HEAD = VOCABULARY * WIDTH
LIMIT = PowerLimit(450.0, 0.1)

# (name, checkpoint's quantization_config, vLLM's settings, bytes of a decoder's weight)
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
FP8_INPUT = {**FP8, "strategy": "token", "dynamic": True}
SCHEMES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], float]] = {
    "awq": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
        },
        {},
        0.5 + 2.5 / 128,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        {},
        0.5 + 2.5 / 128,
    ),
    "online fp8": (None, {"quantization": "fp8"}, 1.0),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": FP8, "input_activations": FP8_INPUT}
            },
        },
        {},
        1.0,
    ),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
        {},
        0.5625,
    ),
    "not at all": (None, {}, 2.0),
}
BINDING = ("awq", "gptq", "online fp8", "compressed-tensors")


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """vLLM's own configuration of Llama 3.1 8B in one of `SCHEMES`."""

    @cache
    def build(name: str, **settings: Any) -> Any:
        from shaper.simulate.engine import engine_config

        stored, given, _ = SCHEMES[name]
        folder = tmp_path_factory.mktemp("model")
        config = load_model_config("llama-3.1-8b")
        if stored is not None:
            config["quantization_config"] = stored
        (folder / "config.json").write_text(json.dumps(config))
        return engine_config(str(folder), GPU, skip_tokenizer_init=True, **given, **settings)

    return build


def counted(width: float, kv_width: float = 2.0) -> WorkCoefficients:
    """The work of Llama 3.1 8B with decoder weights of `width` bytes, by this file's sizes."""
    return WorkCoefficients.from_shape(
        ModelShape(
            *("counted", LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY, 131072),
            weights=WeightBytes(attention=width, output=width, gate_up=width, down=width),
            kv_bytes_per_value=kv_width,
        )
    )


def cache_of(config: Any) -> Any:
    from shaper.emulator.kv_cache import true_model
    from shaper.simulate.engine import kv_cache

    return kv_cache(config, true_model(config, load_profile(GPU)), 1000)


@pytest.mark.parametrize("name", SCHEMES)
def test_coefficients_are_complete(configured: Callable[..., Any], name: str) -> None:
    """FLOPs of attention, feed-forward part and unembedding, and the bytes of the weights as
    they are stored: the same for seconds as for joules."""
    from shaper.engine.work import engine_coefficients

    config, width = configured(name), SCHEMES[name][2]
    found = engine_coefficients(config, cache_of(config))
    assert found.dense_flops_per_token == pytest.approx(2 * DECODER)
    assert found.logits_flops_per_token == pytest.approx(2 * HEAD)
    assert found.flops_per_pair_full == pytest.approx(4 * HEADS * HEAD_DIM * LAYERS)
    assert found.dense_weight_bytes == pytest.approx(DECODER * width + HEAD * 2.0)
    assert sum(gemm.weight_bytes for gemm in found.gemms) == found.dense_weight_bytes
    assert found.kv_bytes_per_token_full == 2 * LAYERS * KV_HEADS * HEAD_DIM * 2


def test_the_scheduler_says_what_its_cache_holds(configured: Callable[..., Any]) -> None:
    """With an 8-bit cache a token has half the bytes, for the shaper and for the emulated GPU."""
    from shaper.emulator.kv_cache import true_model
    from shaper.engine.work import engine_coefficients

    config = configured("not at all", kv_cache_dtype="fp8")
    found = engine_coefficients(config, cache_of(config))
    assert found.kv_bytes_per_token_full == 2 * LAYERS * KV_HEADS * HEAD_DIM
    true = true_model(config, load_profile(GPU)).coefficients
    assert true.kv_bytes_per_token_full == found.kv_bytes_per_token_full


def burst(config: Any, limits: list[PowerLimit] | None, width: float, **settings: Any) -> float:
    """Serves prompts far above the limit; returns the highest window over the limit."""
    from shaper.simulate.build import new_engine
    from shaper.simulate.engine import new_request
    from shaper.simulate.true_gpu import TrueGpu

    plant = TrueGpu(StepModel(load_profile(GPU), counted(width)))
    engine = new_engine(config, GPU, limits, plant=plant, kv_blocks=20_000, **settings)
    for index in range(60):
        at = index * 0.02
        engine.run_until(at)
        tokens = [index * 7 + token % 1000 for token in range(400 + 40 * (index % 30))]
        engine.arrive(new_request(f"r{index}", tokens, 30, config), at)
    engine.run_until(4.0)
    return worst_ratio(engine.gpus.take_segments(), LIMIT)


@pytest.mark.parametrize("name", BINDING)
def test_a_limit_holds_over_quantised_weights(configured: Callable[..., Any], name: str) -> None:
    """No window above 1.005 times the limit on GPUs that do this file's work."""
    assert burst(configured(name), [LIMIT], SCHEMES[name][2]) <= 1.005


def test_the_limit_binds(configured: Callable[..., Any]) -> None:
    """Unshaped, the same requests draw far more: the test above says something."""
    assert burst(configured("awq"), None, SCHEMES["awq"][2]) > 1.3


def test_a_controller_that_counts_too_little_is_seen(
    configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulated GPUs do not follow the shaper's own count: with the unembedding alone, as
    vLLM's metrics give it for AWQ, the hand-counted GPU is over the limit."""
    import dataclasses

    from shaper.simulate import build

    def head_alone(config: Any, cache: Any) -> WorkCoefficients:
        full = counted(SCHEMES["awq"][2])
        return dataclasses.replace(
            full,
            gemms=full.gemms[-1:],
            dense_flops_per_token=0.0,
            flops_per_pair_full=0.0,
            dense_weight_bytes=HEAD * 2.0,
        )

    monkeypatch.setattr(build, "engine_coefficients", head_alone)
    assert burst(configured("awq"), [LIMIT], SCHEMES["awq"][2]) > 1.1


def group(spec: Any, layers: int = LAYERS, first: int = 0) -> Any:
    names = [f"model.layers.{index}.self_attn.attn" for index in range(first, first + layers)]
    return SimpleNamespace(layer_names=names, kv_cache_spec=spec)


def caches(*groups: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=list(groups))


def spec(kind: str, **changes: Any) -> Any:
    """What a layer of this model caches, as vLLM's own classes have it."""
    import torch
    from vllm.v1 import kv_cache_interface

    settings = {
        "block_size": 16,
        "num_kv_heads": KV_HEADS,
        "head_size": HEAD_DIM,
        "dtype": torch.bfloat16,
    }
    return getattr(kv_cache_interface, kind)(**(settings | changes))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: [group(spec("MLAAttentionSpec", num_kv_heads=1))], "MLAAttentionSpec"),
        (
            lambda: [group(spec("ChunkedLocalAttentionSpec", attention_chunk_size=8))],
            "ChunkedLocalAttentionSpec",
        ),
        (lambda: [group(spec("FullAttentionSpec"), 20)], "num_hidden_layers"),
        (lambda: [group(spec("FullAttentionSpec", num_kv_heads=4))], "num_key_value_heads"),
        (
            lambda: [
                group(spec("SlidingWindowSpec", sliding_window=8), 16),
                group(spec("SlidingWindowSpec", sliding_window=9), 16, 16),
            ],
            "windows",
        ),
    ],
)
def test_a_cache_that_is_not_understood_is_refused(
    configured: Callable[..., Any], build: Callable[[], list[Any]], message: str
) -> None:
    """Layers of a kind, a number or a size that the config does not have."""
    from shaper.engine.work import engine_coefficients

    with pytest.raises(EngineError, match=message):
        engine_coefficients(configured("not at all"), caches(*build()))


def test_windows_are_the_schedulers(configured: Callable[..., Any]) -> None:
    """Which layers have a window is what vLLM allocates; layers of drafts are left out."""
    from shaper.engine.work import engine_coefficients

    found = engine_coefficients(
        configured("not at all"),
        caches(
            group(spec("FullAttentionSpec"), 8),
            group(spec("SlidingWindowSpec", sliding_window=512), 12, 8),
            # Without vLLM's hybrid cache manager a layer keeps all, and reads its window.
            group(spec("FullAttentionSpec", sliding_window=512), 12, 20),
            group(spec("FullAttentionSpec"), 1, LAYERS),
        ),
    )
    assert (found.shape.sliding_layers, found.shape.sliding_window_tokens) == (24, 512)
    a_layer = 2 * KV_HEADS * HEAD_DIM * 2
    assert found.kv_bytes_per_token_full == 8 * a_layer
    assert found.kv_bytes_per_token_sliding == 24 * a_layer


def test_a_model_that_is_not_understood_is_refused_by_its_key(
    configured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shaper with a limit, and by the emulator always."""
    from shaper.emulator.kv_cache import served_shape
    from shaper.engine.work import engine_coefficients

    config = configured("not at all", max_model_len=2048)
    text = config.model_config.hf_text_config
    monkeypatch.setattr(text, "kv_lora_rank", 512, raising=False)
    with pytest.raises(EngineError, match="kv_lora_rank"):
        engine_coefficients(config)
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        served_shape(config)
    monkeypatch.delattr(text, "kv_lora_rank")
    monkeypatch.setattr(config.model_config, "quantization", "humming")
    with pytest.raises(EngineError, match="humming"):
        engine_coefficients(config)
