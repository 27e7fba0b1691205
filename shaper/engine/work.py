"""The work of this engine's model: from its config, its weights' formats and vLLM's KV cache.

Dimensions come from the config of the decoder, bytes of weights from how its files or
`--quantization` store them, and the KV cache from the scheduler's own `kv_cache_config`:
which layers cache what, in how many bytes on this GPU. vLLM's `ModelMetrics` is not asked:
it drops attention and feed-forward parts whose quantisation it has no name for, and says
nothing of it. What is not understood is an `EngineError` that names the key.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.engine.compat import setting
from shaper.errors import EngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

# Between the KV heads and sizes that vLLM allocates and those of the config: backends pad.
_AGREES_RATIO = 0.1


def engine_coefficients(vllm_config: VllmConfig, kv_cache_config: Any = None) -> WorkCoefficients:
    """The work of a step on one GPU of this engine.

    Args:
        kv_cache_config: the scheduler's. None: the cache is taken to be as the config of
            the model has it, in 16 bits.

    Raises:
        EngineError: the model, its weights' format or a layer's cache is not understood.
    """
    model_config = vllm_config.model_config
    tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
    try:
        shape = ModelShape.from_hf_config(
            model_config.hf_text_config.to_dict(),
            name=str(model_config.model),
            plain_bytes=float(model_config.dtype.itemsize),
            **_weights(model_config),
        )
        _warn_of_encoder(model_config)
        if kv_cache_config is None:
            return WorkCoefficients.from_shape(shape, tensor_parallel)
        return _with_cache(shape, vllm_config, list(_layer_specs(kv_cache_config)))
    except ValueError as error:
        raise EngineError(
            f"the work of a step can't be computed ({error}), so that nobody would keep a power "
            "limit: start without one, or unshaped with --unshaped-ok"
        ) from error


def _warn_of_encoder(model_config: Any) -> None:
    if not setting(model_config, "is_multimodal_model", False):
        return
    if not setting(setting(model_config, "multimodal_config", None), "language_model_only", False):
        logger.warning(
            "the work of encoding images, sound and video is not counted: a limit holds for "
            "requests of text alone (--language-model-only takes no others)"
        )


def _weights(model_config: Any) -> dict[str, Any]:
    """How the weights are stored, as arguments of `ModelShape.from_hf_config`."""
    parts = (model_config.hf_config, model_config.hf_text_config)
    names = ("quantization_config", "compression_config")
    stored = next((x for y in parts for name in names if (x := setting(y, name, None))), None)
    if stored is not None and not isinstance(stored, Mapping):
        stored = stored.to_dict()
    chosen = setting(model_config, "quantization_config", None)
    online = None if chosen is None else _online(chosen)
    if stored is None:
        method = model_config.quantization
        return {"quantisation": online} if online else {"method": method and str(method)}
    if online is not None:
        raise ValueError("'--quantization-config' beside a quantised checkpoint is not understood")
    return {"quantisation": stored}


def _online(chosen: Any) -> dict[str, Any] | None:
    """vLLM's `QuantizationConfigArgs`; None where it quantises no weights."""
    unknown = object()
    parts = {key: setting(chosen, key, unknown) for key in ("linear", "moe")}
    if unknown in parts.values():
        raise ValueError("'--quantization-config' of this vLLM is not understood")
    others = {
        "ignore": list(setting(chosen, "ignore", [])),
        "targets": setting(chosen, "targets", None),
    }
    formats = {key: str(x) for key, x in parts.items() if x is not None and x.weight is not None}
    if not formats and not others["targets"]:
        return None
    return {"quant_method": "online", **formats, **others}


def _layer_specs(kv_cache_config: Any) -> Iterator[tuple[str, Any]]:
    """(layer's name, what it caches) of each layer that caches anything."""
    for group in kv_cache_config.kv_cache_groups:
        # Of layers that differ in size alone, vLLM keeps each one's own.
        single = setting(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            yield name, single.get(name, group.kv_cache_spec)


def _with_cache(
    shape: ModelShape, vllm_config: VllmConfig, specs: list[tuple[str, Any]]
) -> WorkCoefficients:
    windows: set[int] = set()
    counts = {"full": 0, "sliding": 0}
    kv_bytes = {"full": 0.0, "sliding": 0.0}
    values = shape.head_dim * max(
        1, shape.kv_heads // vllm_config.parallel_config.tensor_parallel_size
    )
    for name, spec in specs:
        if _is_draft(name, shape.layers):
            continue
        kind = type(spec).__name__
        window = setting(spec, "sliding_window", None)
        if kind not in ("FullAttentionSpec", "SlidingWindowSpec") or setting(
            spec, "attention_chunk_size", None
        ):
            raise ValueError(f"layer {name} has a cache of a kind that is not modelled: {kind}")
        has = spec.num_kv_heads * (spec.head_size + setting(spec, "head_size_v", spec.head_size))
        if abs(has / (2 * values) - 1.0) > _AGREES_RATIO:
            raise ValueError(
                f"layer {name} caches {has} values a token on a GPU; "
                f"config keys 'num_key_value_heads' and 'head_dim' give {2 * values}"
            )
        which = "full" if window is None else "sliding"
        counts[which] += 1
        kv_bytes[which] += spec.real_page_size_bytes / spec.block_size
        windows |= set() if window is None else {int(window)}
    if sum(counts.values()) != shape.layers or len(windows) > 1:
        raise ValueError(
            f"{sum(counts.values())} layers have a KV cache, with windows {sorted(windows)}; "
            f"config key 'num_hidden_layers' is {shape.layers}, and windows are of one width"
        )
    shape = dataclasses.replace(
        shape,
        sliding_layers=counts["sliding"],
        sliding_window_tokens=windows.pop() if windows else None,
    )
    parallel = vllm_config.parallel_config
    spread = setting(parallel, "decode_context_parallel_size", 1)
    return dataclasses.replace(
        WorkCoefficients.from_shape(shape, parallel.tensor_parallel_size),
        kv_bytes_per_token_full=kv_bytes["full"] / spread,
        kv_bytes_per_token_sliding=kv_bytes["sliding"] / spread,
    )


def _is_draft(name: str, layers: int) -> bool:
    """vLLM numbers the layers of a draft model on from the decoder's."""
    number = re.search(r"\blayers\.(\d+)", name)
    return number is not None and int(number.group(1)) >= layers
