"""The dimensions of a decoder model, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shaper.core.model.layer_kinds import count, experts, moe_mask, sliding
from shaper.core.model.model_keys import EXPERT_WIDTH_TYPES, HEAD_DIMS, TIED_TYPES, check_keys
from shaper.core.model.quantisation import Matrix, WeightBytes, weight_bytes

_BYTES_PER_VALUE = {
    **dict.fromkeys(("float32", "float"), 4.0),
    **dict.fromkeys(("bfloat16", "float16", "half", "auto", "None"), 2.0),
    "float8_e4m3fn": 1.0,
}
# The decoder of a multimodal model.
_TEXT_KEYS = ("text_config", "llm_config", "language_config")


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
    weights: WeightBytes = field(default_factory=WeightBytes)
    kv_bytes_per_value: float = 2.0
    activation_bytes_per_value: float = 2.0

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any],
        name: str | None = None,
        *,
        quantisation: Mapping[str, Any] | None = None,
        method: str | None = None,
        plain_bytes: float | None = None,
    ) -> ModelShape:
        """Reads a Hugging Face config; a nested `text_config` is used when present.

        Args:
            config: as `config.json` has it.
            name: for messages; by default the config's own.
            quantisation: what says how weights are stored, if `config` does not
                (`hf_quant_config.json`).
            method: with which a server quantises at load.
            plain_bytes: of a weight that is not quantised, if not the config's.

        Raises:
            ValueError: a key is missing, wrong or not understood; the message names it.
        """
        label = name or str(config.get("_name_or_path") or config.get("model_type") or "model")
        text = _decoder(config, label)
        layers = count(text, label, "num_hidden_layers")
        kind = check_keys({"model_type": config.get("model_type"), **text}, label)
        hidden = count(text, label, "hidden_size")
        heads, kv_heads = _heads(text, label)
        head_dim = count(text, label, "head_dim", HEAD_DIMS.get(kind, hidden // heads))
        number, chosen, expert_size, shared = experts(text, label, kind)
        mask = moe_mask(text, label, layers) if number else (False,) * layers
        dense = expert_size if kind in EXPERT_WIDTH_TYPES else 4 * hidden
        window, window_layers = sliding(text, label, kind, layers)
        width = plain_bytes or _plain_bytes(text, config, label)
        found = cls(
            name=label,
            layers=layers,
            hidden_size=hidden,
            attention_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=count(text, label, "intermediate_size", dense if all(mask) else None),
            vocab_size=count(text, label, "vocab_size"),
            max_context_tokens=count(text, label, "max_position_embeddings"),
            tied_embeddings=_tied(text, config, kind, label),
            experts=number,
            experts_per_token=chosen,
            expert_intermediate_size=expert_size,
            moe_layers=sum(mask),
            shared_experts=shared,
            sliding_window_tokens=window,
            sliding_layers=window_layers,
            kv_bytes_per_value=min(width, 2.0),
            activation_bytes_per_value=min(width, 2.0),
        )
        return found._with_weights(
            mask, width, quantisation or _quantisation(text, config, label), method
        )

    def _with_weights(
        self,
        mask: tuple[bool, ...],
        width: float,
        quantisation: Mapping[str, Any] | None,
        method: str | None,
    ) -> ModelShape:
        try:
            weights = weight_bytes(_matrices(self, mask), self.layers, width, quantisation, method)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return replace(self, weights=weights)

    @property
    def weight_bytes_per_value(self) -> float:
        """Mean bytes of a weight in the quantised matrices, scales included; of any weight
        where none is quantised."""
        return self.weights.quantised

    @property
    def parameters(self) -> int:
        """Weights of the model, norms left out (below 0.01% of the whole)."""
        return sum(values for values, _ in self._stored())

    @property
    def weight_bytes(self) -> float:
        """Memory that all weights occupy, all GPUs together."""
        return sum(values * width for values, width in self._stored())

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of one token of context, all layers and GPUs, windows not considered."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes_per_value

    @property
    def kv_bytes_per_token_full(self) -> float:
        """The same of the layers that cache the whole context."""
        return self.kv_bytes_per_token * (self.layers - self.sliding_layers) / self.layers

    def _stored(self) -> tuple[tuple[int, float], ...]:
        """(weights, bytes of each) of each kind of matrix, all layers."""
        of = self.weights
        hidden, ffn = self.hidden_size, self.hidden_size * self.intermediate_size
        expert = 3 * hidden * self.expert_intermediate_size * self.moe_layers
        dense = self.layers - self.moe_layers
        heads = self.attention_heads + 2 * self.kv_heads
        embeddings = self.vocab_size * hidden
        return (
            (self.layers * hidden * self.head_dim * heads, of.attention),
            (self.layers * hidden * self.head_dim * self.attention_heads, of.output),
            (dense * 2 * ffn, of.gate_up),
            (dense * ffn, of.down),
            (expert * self.experts, of.experts),
            (expert * self.shared_experts, of.shared),
            (self.moe_layers * hidden * self.experts, of.plain),
            (embeddings, of.head),
            (0 if self.tied_embeddings else embeddings, of.plain),
        )


def _decoder(config: Mapping[str, Any], label: str) -> Mapping[str, Any]:
    for key in _TEXT_KEYS:
        text = config.get(key)
        if text is not None:
            if not isinstance(text, Mapping) or not text:
                raise ValueError(f"{label}: config key {key!r} is no object with entries")
            return text
    return config


def _tied(text: Mapping[str, Any], config: Mapping[str, Any], kind: str, label: str) -> bool:
    for part in (text, config):
        value = part.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
        if value is not None:
            raise ValueError(
                f"{label}: config key 'tie_word_embeddings' is {value!r}, not true or false"
            )
    return kind in TIED_TYPES


def _plain_bytes(text: Mapping[str, Any], config: Mapping[str, Any], label: str) -> float:
    for part in (text, config):
        for key in ("dtype", "torch_dtype"):
            value = part.get(key)
            if value is None:
                continue
            width = _BYTES_PER_VALUE.get(str(value).removeprefix("torch."))
            if width is None:
                raise ValueError(f"{label}: config key {key!r} is {value!r}, which is not known")
            return width
    return 2.0


def _heads(text: Mapping[str, Any], label: str) -> tuple[int, int]:
    heads = count(text, label, "num_attention_heads")
    kv_heads = count(text, label, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"{label}: config key 'num_key_value_heads' is {kv_heads}, which does not divide "
            f"'num_attention_heads' {heads}"
        )
    return heads, kv_heads


def _quantisation(
    text: Mapping[str, Any], config: Mapping[str, Any], label: str
) -> Mapping[str, Any] | None:
    for part in (config, text):
        for key in ("quantization_config", "compression_config"):
            value = part.get(key)
            if value is None or value == {}:
                continue
            if not isinstance(value, Mapping):
                raise ValueError(f"{label}: config key {key!r} is no object")
            return value
    return None


def _matrices(shape: ModelShape, mask: tuple[bool, ...]) -> list[Matrix]:
    """Every matrix that may be quantised, with the names that lists of exceptions use."""
    hidden, kv = shape.hidden_size, shape.kv_heads * shape.head_dim
    q = shape.attention_heads * shape.head_dim
    ffn, expert = shape.intermediate_size, shape.expert_intermediate_size
    found = [Matrix("head", shape.vocab_size * hidden, ("lm_head",))]

    def add(kind: str, weights: int, *names: str) -> None:
        found.append(Matrix(kind, weights, names))

    for layer, has_experts in enumerate(mask):
        at = f"layers.{layer}."
        attention = at + "self_attn."
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            add("attention", hidden * width, attention + name, attention + "qkv_proj")
        add("output", hidden * q, attention + "o_proj")
        parts = (
            ("gate_up", "gate_proj", "w1"),
            ("gate_up", "up_proj", "w3"),
            ("down", "down_proj", "w2"),
        )
        for kind, name, short in parts:
            fused = "gate_up_proj" if kind == "gate_up" else name
            if not has_experts:
                add(kind, hidden * ffn, *(f"{at}mlp.{one}" for one in (name, fused)))
                continue
            add(
                "experts",
                hidden * expert * shape.experts,
                *(f"{at}mlp.experts.{one}" for one in (f"0.{name}", fused)),
                f"{at}block_sparse_moe.experts.0.{short}",
            )
            if shape.shared_experts:
                add(
                    "shared",
                    hidden * expert * shape.shared_experts,
                    *(
                        f"{at}mlp.shared_expert{s}.{one}"
                        for s in ("", "s")
                        for one in (name, fused)
                    ),
                )
    return found
