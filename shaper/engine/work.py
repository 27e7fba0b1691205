"""The coefficients of this engine's model: from its config, checked against vLLM's own.

vLLM knows what it really loads (quantised weights, a narrower KV cache), so its
`ModelMetrics` has the last word on dense models: three probes solve for FLOPs per
token, per logit and per attended pair, and for the bytes of the weights and of a
token's KV cache. Mixture-of-experts and sliding layers are not linear in the batch;
there the config's numbers stand.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from shaper.core.work import ModelShape, WorkCoefficients
from shaper.errors import EngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_PROBE_CONTEXT_TOKENS = 1001


def engine_coefficients(vllm_config: VllmConfig) -> WorkCoefficients:
    """The work of a step on one GPU of this engine.

    Raises:
        EngineError: the model's kind is not known to the shaper.
    """
    model_config = vllm_config.model_config
    config = model_config.hf_text_config.to_dict()
    tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
    try:
        shape = ModelShape.from_hf_config(config, name=str(model_config.model))
        coefficients = WorkCoefficients.from_shape(shape, tensor_parallel)
    except ValueError as error:
        raise EngineError(
            f"the work of model {model_config.model} can't be computed ({error}); "
            "start with --shaper-off, or without a power limit"
        ) from error
    if shape.moe_layers or shape.sliding_layers:
        return coefficients
    return _as_vllm_counts(coefficients, vllm_config)


def _as_vllm_counts(coefficients: WorkCoefficients, vllm_config: VllmConfig) -> WorkCoefficients:
    try:
        from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics

        metrics = ModelMetrics(vllm_config)
        if not metrics.is_enabled():
            return coefficients
        single = ExecutionContext.from_single_request
        short = single(1, 1, is_prefill=False)
        long = single(1, _PROBE_CONTEXT_TOKENS, is_prefill=False)
        pair = single(2, 2, is_prefill=True)
        return dataclasses.replace(coefficients, **_solve(metrics, short, long, pair))
    # ModelMetrics is not a stable interface, and the config's own numbers are good.
    except Exception:
        logger.warning("vLLM's ModelMetrics can't be used; going by the model's config")
        return coefficients


def _solve(metrics: Any, short: Any, long: Any, pair: Any) -> dict[str, Any]:
    """Dense coefficients from a short decode, a long decode and a prefill of two tokens."""
    contexts = _PROBE_CONTEXT_TOKENS - 1
    per_pair = (metrics.get_num_flops(long) - metrics.get_num_flops(short)) / contexts
    one = metrics.get_num_flops(short) - per_pair
    # A prefill of two tokens at context two: two tokens, one logit, four pairs.
    per_token = metrics.get_num_flops(pair) - 4 * per_pair - one
    kv = (metrics.get_read_bytes(long) - metrics.get_read_bytes(short)) / contexts
    weights = sum(
        count for name, count in metrics.get_read_bytes_breakdown(short).items() if "weight" in name
    )
    return {
        "flops_per_pair_full": per_pair,
        "dense_flops_per_token": per_token,
        "logits_flops_per_token": one - per_token,
        "kv_bytes_per_token_full": kv,
        "dense_weight_bytes": weights,
    }
