"""The KV cache that an emulated GPU has room for, in vLLM's terms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_GIBIBYTE = float(1 << 30)
# The CUDA context, cuBLAS workspaces and captured graphs of one process: an estimate.
_CONTEXT_BYTES = 1.5 * _GIBIBYTE
_CACHE_DTYPES = {
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float": torch.float32,
}


def available_kv_bytes(model: StepModel, utilization_ratio: float, max_batched_tokens: int) -> int:
    """Bytes of KV cache on each GPU: its memory's share, less weights and activations.

    Activations are those of the largest step that vLLM profiles at start: the
    widest intermediate and the residual stream in 16 bits for every token.

    Raises:
        ConfigError: the weights leave no room.
    """
    coefficients = model.coefficients
    shape = coefficients.shape
    weights = shape.weight_bytes / coefficients.tensor_parallel
    width = 2 * shape.intermediate_size / coefficients.tensor_parallel + 4 * shape.hidden_size
    activations = max_batched_tokens * width * shape.activation_bytes_per_value
    memory = model.profile.memory.capacity_bytes
    left = memory * utilization_ratio - weights - activations - _CONTEXT_BYTES
    if left <= 0:
        raise ConfigError(
            f"{shape.name} does not fit {model.profile.name}: {weights / 1e9:.0f} GB of weights "
            f"per GPU and {utilization_ratio:.0%} of {memory / 1e9:.0f} GB to put them in; "
            "give a larger --tensor-parallel-size"
        )
    return int(left)


def served_shape(config: VllmConfig) -> ModelShape:
    """The model that vLLM serves, as the emulated GPU runs it: the truth of its steps.

    Deliberately not what the shaper makes of the same configuration
    (`shaper.engine.work`), so that a mistake there shows as power.

    Raises:
        ConfigError: a model or a way to store it that is not emulated.
    """
    model_config = config.model_config
    stored = getattr(model_config.hf_config, "quantization_config", None)
    method = getattr(model_config, "quantization", None) if stored is None else None
    try:
        shape = ModelShape.from_hf_config(
            model_config.hf_config.to_dict(),
            method=method,
            plain_bytes=_width(model_config.dtype),
        )
    except ValueError as error:
        raise ConfigError(f"this model is not emulated: {error}") from error
    return replace(shape, kv_bytes_per_value=_width(_cache_dtype(config)))


def true_model(config: VllmConfig, profile: GpuProfile) -> StepModel:
    """What steps of this engine truly take on GPUs of this profile (see `served_shape`).

    Raises:
        ConfigError: a model that is not emulated.
    """
    tensor_parallel = config.parallel_config.tensor_parallel_size
    return StepModel(profile, WorkCoefficients.from_shape(served_shape(config), tensor_parallel))


def kv_cache_specs(config: VllmConfig, shape: ModelShape) -> dict[str, Any]:
    """vLLM's KV cache spec of each layer, of what one GPU holds.

    Sliding layers are those that the config names in `layer_types`, else the first
    `shape.sliding_layers`; the cache manager only counts them.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    kv_heads = max(1, shape.kv_heads // config.parallel_config.tensor_parallel_size)
    common = {
        "block_size": config.cache_config.block_size,
        "num_kv_heads": kv_heads,
        "head_size": shape.head_dim,
        "dtype": _cache_dtype(config),
    }
    text_config = config.model_config.hf_text_config
    kinds = getattr(text_config, "layer_types", None) or []
    specs: dict[str, Any] = {}
    for layer in range(shape.layers):
        sliding = layer < shape.sliding_layers
        if len(kinds) == shape.layers and shape.sliding_layers:
            sliding = "sliding" in str(kinds[layer])
        name = f"model.layers.{layer}.self_attn.attn"
        if sliding and shape.sliding_window_tokens:
            specs[name] = SlidingWindowSpec(**common, sliding_window=shape.sliding_window_tokens)
        else:
            specs[name] = FullAttentionSpec(**common)
    return specs


def _width(dtype: torch.dtype | str) -> float:
    """Bytes of a value."""
    return float((_CACHE_DTYPES[dtype] if isinstance(dtype, str) else dtype).itemsize)


def _cache_dtype(config: VllmConfig) -> torch.dtype:
    name = config.cache_config.cache_dtype
    if name == "auto":
        return config.model_config.dtype
    # The 8-bit formats are stored as bytes.
    return _CACHE_DTYPES.get(name, torch.uint8)
