"""The dimensions of a decoder model, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BYTES_PER_VALUE = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8_e4m3fn": 1.0}
_QUANTISED_BYTES = {
    "fp8": 1.0,
    "fbgemm_fp8": 1.0,
    "modelopt": 1.0,
    "mxfp4": 0.5,
    "awq": 0.5,
    "gptq": 0.5,
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's dimensions. Counts are of the whole model, before any parallelism.

    A dense model has no experts (`experts == 0`, `moe_layers == 0`). With
    `sliding_window_tokens`, `sliding_layers` of the layers attend only that far back.
    """

    name: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    tied_embeddings: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    moe_layers: int = 0
    shared_experts: int = 0
    sliding_window_tokens: int | None = None
    sliding_layers: int = 0
    weight_bytes_per_value: float = 2.0
    kv_bytes_per_value: float = 2.0
    activation_bytes_per_value: float = 2.0

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], name: str | None = None) -> ModelShape:
        """Reads a Hugging Face config; a nested `text_config` is used when present.

        Raises:
            ValueError: a dimension is missing or wrong, or the attention is of a kind
                (multi-head latent attention) that this module does not know.
        """
        text = config.get("text_config")
        text = text if isinstance(text, Mapping) else config
        label = name or str(config.get("_name_or_path") or config.get("model_type") or "model")
        if text.get("kv_lora_rank"):
            raise ValueError(f"{label}: multi-head latent attention is not supported")
        layers = _count(text, label, "num_hidden_layers")
        hidden = _count(text, label, "hidden_size")
        heads = _count(text, label, "num_attention_heads")
        experts, chosen, expert_size, moe_layers, shared = _experts(text, label, layers)
        window, sliding = _sliding(text, layers)
        value_bytes = _BYTES_PER_VALUE.get(
            str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")), 2.0
        )
        quantised = config.get("quantization_config")
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        return cls(
            name=label,
            layers=layers,
            hidden_size=hidden,
            attention_heads=heads,
            kv_heads=_count(text, label, "num_key_value_heads", heads),
            head_dim=_count(text, label, "head_dim", hidden // heads),
            intermediate_size=_count(text, label, "intermediate_size", 4 * hidden),
            vocab_size=_count(text, label, "vocab_size"),
            max_context_tokens=_count(text, label, "max_position_embeddings"),
            tied_embeddings=bool(
                text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
            ),
            experts=experts,
            experts_per_token=chosen,
            expert_intermediate_size=expert_size,
            moe_layers=moe_layers,
            shared_experts=shared,
            sliding_window_tokens=window,
            sliding_layers=sliding,
            weight_bytes_per_value=_QUANTISED_BYTES.get(str(method), value_bytes),
            kv_bytes_per_value=min(value_bytes, 2.0),
            activation_bytes_per_value=min(value_bytes, 2.0),
        )

    @property
    def parameters(self) -> int:
        """Weights of the model, norms left out (below 0.01% of the whole)."""
        attention = 2 * self.hidden_size * self.head_dim * (self.attention_heads + self.kv_heads)
        dense = 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.expert_intermediate_size
        moe = expert * (self.experts + self.shared_experts) + self.hidden_size * self.experts
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return (
            self.layers * attention
            + (self.layers - self.moe_layers) * dense
            + self.moe_layers * moe
            + embeddings
        )

    @property
    def weight_bytes(self) -> float:
        """Memory that all weights occupy, all GPUs together."""
        return self.parameters * self.weight_bytes_per_value

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of one token of context, all layers and GPUs, windows not considered."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes_per_value


def _count(config: Mapping[str, Any], label: str, key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{label}: config key {key!r} is {value!r}, not a positive integer")
    return value


def _experts(text: Mapping[str, Any], label: str, layers: int) -> tuple[int, int, int, int, int]:
    """(experts, chosen per token, expert width, layers that have them, shared ones)."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((int(text[key]) for key in keys if text.get(key)), 0)
    if not experts:
        return 0, 0, 0, 0, 0
    chosen = _count(text, label, "num_experts_per_tok")
    if chosen > experts:
        raise ValueError(f"{label}: {chosen} experts per token of only {experts}")
    width = text.get("moe_intermediate_size") or text.get("intermediate_size")
    shared = int(text.get("n_shared_experts") or text.get("num_shared_experts") or 0)
    moe_layers = layers
    if text.get("interleave_moe_layer_step"):
        moe_layers = layers // int(text["interleave_moe_layer_step"])
    elif "moe_layer_freq" in text and "first_k_dense_replace" in text:
        first, every = int(text["first_k_dense_replace"]), int(text["moe_layer_freq"])
        moe_layers = sum(1 for i in range(layers) if i >= first and i % every == 0)
    return experts, chosen, _count({"width": width}, label, "width"), moe_layers, shared


def _sliding(text: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """(window, layers that have it). Qwen names a window and turns it off."""
    window = text.get("sliding_window")
    if not isinstance(window, int) or window <= 0 or text.get("use_sliding_window") is False:
        return None, 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        sliding = sum(1 for kind in kinds[:layers] if "sliding" in str(kind))
        return (window, sliding) if sliding else (None, 0)
    pattern = text.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 1:
        return window, layers - layers // pattern
    if text.get("model_type") in ("gemma3", "gemma3_text"):
        return window, layers - layers // 6
    if text.get("model_type") == "gemma2":
        return window, (layers + 1) // 2
    return window, layers
