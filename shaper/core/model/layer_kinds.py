"""Which layers of a decoder have experts, and which a window, by its config's keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shaper.core.model.model_keys import (
    ALL_SLIDING_TYPES,
    CHOSEN_KEYS,
    EXPERT_KEYS,
    EXPERT_WIDTH_TYPES,
    SHARED_COUNT_KEYS,
    SHARED_WIDTH_KEYS,
)

# Far above any model: what is larger is a mistake, and would overflow later.
_LARGEST = 10**9
_MOST_LAYERS = 10_000


def count(config: Mapping[str, Any], label: str, key: str, default: int | None = None) -> int:
    """A positive whole number of a config; `default` where the key is missing or null.

    Raises:
        ValueError: it is something else; names the key.
    """
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{label}: config key {key!r} is missing")
    most = _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{label}: config key {key!r} is {value!r}, not a positive integer")
    return value


def one_of(text: Mapping[str, Any], label: str, keys: Sequence[str]) -> int:
    """The number that these spellings of one quantity give; 0 where none is there.

    Raises:
        ValueError: they give two, or something that is no count; names the key.
    """
    found = {key: count(text, label, key) for key in keys if text.get(key) not in (None, 0)}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key!r} {value}" for key, value in found.items())
        raise ValueError(f"{label}: config keys contradict each other: {said}")
    return next(iter(found.values()), 0)


def experts(text: Mapping[str, Any], label: str, kind: str) -> tuple[int, int, int, int]:
    """(experts, chosen per token, width of one, shared ones); zeros for a dense model.

    Raises:
        ValueError: a number is missing, wrong, or in a spelling that is not known.
    """
    number = one_of(text, label, EXPERT_KEYS)
    if number == 0:
        return 0, 0, 0, 0
    chosen = one_of(text, label, CHOSEN_KEYS)
    if chosen == 0:
        raise ValueError(f"{label}: config key 'num_experts_per_tok' is missing")
    if chosen > number:
        raise ValueError(f"{label}: {chosen} experts per token of only {number}")
    key = "moe_intermediate_size"
    if text.get(key) is None and kind in EXPERT_WIDTH_TYPES:
        key = "intermediate_size"
    width = count(text, label, key)
    shared = one_of(text, label, SHARED_COUNT_KEYS)
    shared_width = one_of(text, label, SHARED_WIDTH_KEYS)
    if shared_width and (shared_width % width or shared not in (0, 1)):
        raise ValueError(
            f"{label}: config key {SHARED_WIDTH_KEYS[0]!r} is {shared_width}, not a multiple "
            f"of {key!r} {width}"
        )
    return number, chosen, width, shared_width // width if shared_width else shared


def moe_mask(text: Mapping[str, Any], label: str, layers: int) -> tuple[bool, ...]:
    """[layers] whether a layer of a model with experts has them."""
    mask = [True] * layers
    frequency = text.get("moe_layer_freq")
    if isinstance(frequency, list):
        _check_list(frequency, label, "moe_layer_freq", layers, (0, 1))
        mask = [value == 1 for value in frequency]
    else:
        first = _number(text, label, "first_k_dense_replace", 0)
        every = _number(text, label, "moe_layer_freq", 1)
        mask = [index >= first and index % every == 0 for index in range(layers)]
    for key in ("decoder_sparse_step", "interleave_moe_layer_step"):
        every = _number(text, label, key, 1)
        mask = [held and (index + 1) % every == 0 for index, held in enumerate(mask)]
    start = _number(text, label, "moe_layer_start_index", 0)
    end = text.get("moe_layer_end_index", -1)
    if isinstance(end, list) or not isinstance(end, int):
        raise ValueError(f"{label}: config key 'moe_layer_end_index' is {end!r}")
    last = layers - 1 if end < 0 else end
    every = _number(text, label, "moe_layer_interval", 1)
    mask = [
        held and start <= index <= last and (index + 1) % every == 0
        for index, held in enumerate(mask)
    ]
    kinds = text.get("mlp_layer_types")
    if kinds is not None:
        _check_list(kinds, label, "mlp_layer_types", layers, ("dense", "sparse"))
        mask = [value == "sparse" for value in kinds]
    dense = text.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise ValueError(f"{label}: config key 'mlp_only_layers' is {dense!r}, no list of layers")
    return tuple(held and index not in dense for index, held in enumerate(mask))


def sliding(text: Mapping[str, Any], label: str, kind: str, layers: int) -> tuple[int | None, int]:
    """(window in tokens, layers that have it). Qwen names a window and turns it off.

    Raises:
        ValueError: attention of a kind that is not known, or nothing says which layers.
    """
    kinds = text.get("layer_types")
    known = ("full_attention", "sliding_attention", "attention")
    number = 0
    if kinds is not None:
        _check_list(kinds, label, "layer_types", layers, known)
        number = sum(1 for one in kinds if one == "sliding_attention")
        if number == 0:
            return None, 0
    if text.get("use_sliding_window") is False and number == 0:
        return None, 0
    window = text.get("sliding_window")
    if window in (None, 0, -1, False) and number == 0:
        return None, 0
    window = count(text, label, "sliding_window")
    if number:
        return window, number
    pattern = text.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 1:
        return window, layers - layers // pattern
    if kind == "gemma3_text":
        return window, layers - layers // 6
    if kind in ("cohere2", "olmo3"):
        return window, layers - layers // 4
    if kind in ("gemma2", "gpt_oss"):
        return window, (layers + 1) // 2
    if kind.startswith("qwen"):
        first = _number(text, label, "max_window_layers", 0)
        return (window, layers - first) if first < layers else (None, 0)
    if kind in ALL_SLIDING_TYPES:
        return window, layers
    raise ValueError(
        f"{label}: config key 'layer_types' is missing, which says which layers have the "
        f"'sliding_window' of {window}"
    )


def _number(text: Mapping[str, Any], label: str, key: str, default: int) -> int:
    value = text.get(key)
    if value is None or value == default:
        return default
    return 0 if value == 0 and default == 0 else count(text, label, key)


def _check_list(value: Any, label: str, key: str, layers: int, known: Sequence[object]) -> None:
    if not isinstance(value, list) or len(value) != layers:
        raise ValueError(f"{label}: config key {key!r} has no entry for each of {layers} layers")
    for entry in value:
        if isinstance(entry, bool) or entry not in known:
            raise ValueError(f"{label}: config key {key!r} names {entry!r}, which is not modelled")
