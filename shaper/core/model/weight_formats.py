"""Which weights a quantised model stores in how many bytes, by method.

    format              bytes a weight, scales included
    fp8, int8           1 (scales by tensor, channel or block are below 0.1%)
    MXFP8, MXFP4        1 or 0.5, and a byte of scale for 32 weights
    NVFP4               0.5, and a byte of scale for 16 weights
    AWQ, GPTQ, INT4     bits / 8, and a 16-bit scale and a zero point for each group

What a method leaves alone stays at the model's own width: the unembedding, routers and
every module that the files name (`modules_to_not_convert`, `ignore`, `exclude_modules`
and their like). A method, or an exception to it, that is not understood is an error
that names its key: a wrong guess here is a step at the wrong power.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("attention", "output", "gate_up", "down", "experts", "shared", "head")
"""Kinds of matrices: projections into and out of attention, those of a dense
feed-forward part, routed and shared experts, the unembedding."""

_FP8_METHODS = frozenset(
    {"fp8", "fbgemm_fp8", "ptpc_fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel"}
)
_GROUPED_METHODS = frozenset(
    {
        *("awq", "auto_awq", "awq_marlin", "gptq", "auto_gptq", "gptq_marlin", "gptqmodel"),
        *("moe_wna16", "inc", "auto-round", "auto_round", "intel/auto-round"),
    }
)
_MODELOPT_BYTES = {
    **dict.fromkeys(("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "INT8", "INT8_SQ"), 1.0),
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"), 0.5 + 1 / 16),
    **dict.fromkeys(("W4A16_AWQ", "W4A8_AWQ", "INT4_AWQ"), 0.5 + 2 / 128),
    "MXFP8": 1 + 1 / 32,
    "MXFP4": 0.5 + 1 / 32,
}
# bitsandbytes: a scale of 4 bytes for 64 weights, or of a byte when scales are quantised
# again. Files often don't say; 0.54 is within 5% of both.
_BITSANDBYTES_BYTES = {True: 0.5 + 1 / 64, False: 0.5 + 4 / 64, None: 0.54}
# How vLLM names the formats of `--quantization-config`.
_ONLINE_BYTES = (
    ("fp8", 1.0),
    ("int8", 1.0),
    ("mxfp8", 1 + 1 / 32),
    ("mxfp4", 0.5 + 1 / 32),
    ("nvfp4", 0.5 + 1 / 16),
    ("int4_per_group_32", 0.5 + 2 / 32),
)
_EXPERTS_ONLY = {
    "experts_int8": 1.0,
    "int8_per_channel_weight_only": 1.0,
    "nvfp4_per_token": 0.5 + 1 / 16,
    "gpt_oss_mxfp4": 0.5 + 1 / 32,
}
_LEFT_ALONE_KEYS = (
    *("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"),
    *("llm_int8_skip_modules", "modules_to_skip", "exclude"),
)


@dataclass(slots=True)
class Rules:
    """What is quantised, and to how many bytes a weight."""

    widths: dict[str, float]
    """By kind of matrix; the kinds that are not here are left alone."""
    named: list[tuple[str, str, float | None]] = field(default_factory=list)
    """(key, name or pattern of modules, bytes; None: left alone). The first one that
    names a matrix holds before `widths`."""


def _linear(width: float) -> Rules:
    return Rules({kind: width for kind in KINDS if kind != "head"})


def rules_of(quantisation: Mapping[str, Any] | None, method: str | None) -> Rules | None:
    """What a method does to the weights; None: nothing.

    Args:
        quantisation: the checkpoint's `quantization_config`, what is in its
            `hf_quant_config.json`, or vLLM's own of `--quantization-config` (`quant_method`
            is `online`; `linear` and `moe` name formats). None: files are not quantised.
        method: vLLM's name of the method that it quantises such weights with at load.

    Raises:
        ValueError: a method or an exception that is not understood; names the key.
    """
    if quantisation:
        return _checkpoint_rules(quantisation)
    return None if method is None else _online_rules(method)


def _checkpoint_rules(whole: Mapping[str, Any]) -> Rules:
    inner = whole.get("quantization")
    config = inner if isinstance(inner, Mapping) else whole
    method = config.get("quant_method", whole.get("quant_method"))
    algorithm = config.get("quant_algo")
    if method is None and algorithm is not None:
        method = "modelopt"
    if config.get("dequantize"):
        raise ValueError("quantisation key 'dequantize' is set, which is not understood")
    left_alone = [
        (key, str(name), None) for key in _LEFT_ALONE_KEYS for name in _names(config, key)
    ]
    method = str(method)
    if method.startswith("modelopt") or method == "petit_nvfp4":
        rules = _modelopt_rules(config, algorithm)
    elif method in ("compressed-tensors", "compressed_tensors"):
        rules = _compressed_rules(config)
    elif method == "online":
        rules = _spelled_rules(config)
    elif method in ("mxfp4", "gpt_oss_mxfp4"):
        rules = Rules({"experts": 0.5 + 1 / 32})
    elif method in _FP8_METHODS or method in ("mxfp8", "experts_int8"):
        rules = _online_rules(method)
    elif method in _GROUPED_METHODS:
        rules = _grouped_rules(config)
    elif method == "bitsandbytes":
        rules = _bitsandbytes_rules(config)
    else:
        raise ValueError(f"quantisation key 'quant_method' is {method!r}, which is not understood")
    rules.named[:0] = left_alone
    return rules


def _online_rules(method: str) -> Rules:
    if method in _EXPERTS_ONLY:
        return Rules({"experts": _EXPERTS_ONLY[method]})
    if method == "bitsandbytes":
        return _linear(_BITSANDBYTES_BYTES[None])
    if method in _FP8_METHODS or method in ("mxfp8", "mxfp4"):
        return _linear(_format_bytes(method))
    raise ValueError(f"quantisation {method!r}: how many bytes a weight has is not known")


def _spelled_rules(config: Mapping[str, Any]) -> Rules:
    if config.get("targets"):
        raise ValueError("quantisation key 'targets' is set, which is not understood")
    rules = Rules({})
    if config.get("linear") is not None:
        rules = _linear(_format_bytes(str(config["linear"])))
        del rules.widths["experts"]
    if config.get("moe") is not None:
        rules.widths["experts"] = _format_bytes(str(config["moe"]))
    return rules


def _format_bytes(name: str) -> float:
    for start, width in _ONLINE_BYTES:
        if name.startswith(start):
            return width
    if name in _FP8_METHODS:
        return 1.0
    raise ValueError(f"quantisation {name!r}: how many bytes a weight has is not known")


def _modelopt_rules(config: Mapping[str, Any], algorithm: Any) -> Rules:
    if algorithm == "MIXED_PRECISION":
        layers = config.get("quantized_layers")
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError("quantisation key 'quantized_layers' is missing for MIXED_PRECISION")
        rules = Rules({})
        for name, of in layers.items():
            width = _modelopt_bytes(of.get("quant_algo") if isinstance(of, Mapping) else of, {})
            rules.named.append(("quantized_layers", str(name), width))
        return rules
    return _linear(_modelopt_bytes(algorithm, config))


def _modelopt_bytes(algorithm: Any, config: Mapping[str, Any]) -> float:
    if str(algorithm) not in _MODELOPT_BYTES:
        raise ValueError(f"quantisation key 'quant_algo' is {algorithm!r}, which is not understood")
    width = _MODELOPT_BYTES[str(algorithm)]
    if "AWQ" in str(algorithm) and algorithm != "NVFP4_AWQ":
        return 0.5 + 2.0 / _whole(config, "group_size", 128)
    return width


def _grouped_rules(config: Mapping[str, Any]) -> Rules:
    bits = _whole(config, "bits", config.get("w_bit"))
    data_type = str(config.get("data_type", "int"))
    if data_type != "int":
        raise ValueError(f"quantisation key 'data_type' is {data_type!r}, which is not understood")
    rules = _linear(_grouped_bytes(bits, config.get("group_size", config.get("q_group_size"))))
    if config.get("lm_head"):
        rules.widths["head"] = rules.widths["output"]
    # GPTQModel: a regular expression after `-:` leaves modules alone, after `+:` it changes them.
    for key in ("dynamic", "extra_config"):
        for pattern, change in _mapping(config, key).items():
            change = change if isinstance(change, Mapping) else {}
            width = None
            if not str(pattern).startswith("-:") and _whole(change, "bits", bits) < 16:
                size = change.get("group_size", config.get("group_size"))
                width = _grouped_bytes(_whole(change, "bits", bits), size)
            prefix = "re:" if key == "dynamic" else ""
            rules.named.append((key, prefix + re.sub(r"^[-+]:", "", str(pattern)), width))
    return rules


def _grouped_bytes(bits: int, group_size: Any) -> float:
    if bits > 8:
        raise ValueError(f"quantisation key 'bits' is {bits}, which is not understood")
    width = bits / 8
    if group_size in (None, -1, 0):
        return width
    size = _whole({"group_size": group_size}, "group_size", None)
    return width + (2 + width) / size


def _bitsandbytes_rules(config: Mapping[str, Any]) -> Rules:
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        twice = config.get("bnb_4bit_use_double_quant")
        return _linear(_BITSANDBYTES_BYTES[None if twice is None else bool(twice)])
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return _linear(1.0)
    raise ValueError("quantisation key 'load_in_4bit' is missing: how many bits is not said")


def _compressed_rules(config: Mapping[str, Any]) -> Rules:
    sparsity = _mapping(config, "sparsity_config")
    if sparsity and sparsity.get("format") not in (None, "dense"):
        raise ValueError("quantisation key 'sparsity_config' is set, which is not understood")
    groups = _mapping(config, "config_groups")
    if not groups:
        raise ValueError("quantisation key 'config_groups' is missing")
    rules = Rules({})
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise ValueError(f"quantisation key 'config_groups.{name}' is no object")
        width = _compressed_bytes(name, group)
        for target in _names(group, "targets") or ["Linear"]:
            if target in ("Linear", "LinearBase"):
                rules.widths.update(_linear(width).widths)
            elif target in ("RoutedExperts", "FusedMoE", "MoE"):
                rules.widths["experts"] = width
            else:
                rules.named.append((f"config_groups.{name}.targets", target, width))
    return rules


def _compressed_bytes(name: str, group: Mapping[str, Any]) -> float:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"quantisation key 'config_groups.{name}.weights' is missing")
    bits = _whole(weights, "num_bits", None)
    kind = str(weights.get("type", "int"))
    size = weights.get("group_size")
    if kind == "float" and bits == 4:
        if size not in (None, 16, 32):
            raise ValueError(f"quantisation key 'config_groups.{name}.weights.group_size': {size}")
        return 0.5 + 1 / float(size or 16)
    if kind not in ("int", "float") or bits > 8:
        raise ValueError(f"quantisation key 'config_groups.{name}.weights.num_bits' is {bits}")
    if size in (None, -1, 0):
        return bits / 8
    scale = 1.0 if kind == "float" else 2.0
    zero = 0.0 if weights.get("symmetric", True) else bits / 8
    return bits / 8 + (scale + zero) / _whole(weights, "group_size", None)


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key)
    if value in (None, "", [], {}):
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"quantisation key {key!r} is no list of names")
    return list(value)


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"quantisation key {key!r} is no object")
    return value


def _whole(config: Mapping[str, Any], key: str, default: Any) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"quantisation key {key!r} is {value!r}, not a positive whole number")
    return value
