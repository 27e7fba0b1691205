"""What a published `config.json` leaves out, from transformers' class of that model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from shaper.core.model.model_keys import ALL_SLIDING_TYPES, HEAD_DIMS, KNOWN_TYPES

_NEEDED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "intermediate_size", "max_position_embeddings"),
)


def filled_in(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with what transformers would take for keys that are missing.

    Keys that are there stay as they are. transformers takes seconds to import, and is
    imported only for a config that lacks a key that counts. Where it is not installed, or
    does not know the model, the config comes back as it is, and who reads it names the key.
    """
    text = config.get("text_config")
    nested = isinstance(text, Mapping)
    part: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    if not _lacks_something(part, config.get("model_type")):
        return config
    whole = _defaults(config)
    if nested:
        known = whole.get("text_config")
        if not isinstance(known, Mapping):
            return config
        # Whether embeddings are tied, the outer config says for both.
        said = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        return {**config, "text_config": {**known, **said, **_given(part)}}
    return {**whole, **_given(config)}


def _lacks_something(text: Mapping[str, Any], outer_kind: Any) -> bool:
    kind = text.get("model_type", outer_kind)
    if not isinstance(kind, str):
        return False
    if kind not in KNOWN_TYPES and f"{kind}_text" not in KNOWN_TYPES:
        return False
    if any(text.get(key) is None for key in _NEEDED):
        return True
    if text.get("head_dim") is None and kind in HEAD_DIMS:
        return True
    window = text.get("sliding_window") and text.get("use_sliding_window", True)
    return bool(window) and text.get("layer_types") is None and kind not in ALL_SLIDING_TYPES


def _given(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value is not None}


def _defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if importlib.util.find_spec("transformers") is None:
        return {}
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.utils import logging

        told = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            made = CONFIG_MAPPING[str(config.get("model_type"))].from_dict(dict(config))
            found: dict[str, Any] = made.to_dict()
        finally:
            logging.set_verbosity(told)
    # transformers checks values in ways of its own, which differ by version; the reader of
    # the config names what is wrong.
    except Exception:
        return {}
    return found
