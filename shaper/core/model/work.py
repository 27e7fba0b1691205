"""What one engine step computes and moves, from a model's published dimensions.

Laws, per GPU of a tensor-parallel engine of `tp` GPUs, for a step of T tokens:

    GEMM FLOPs       2 * n * k for each weight matrix and each token it sees
    attention FLOPs  4 * head_dim * heads for each (query, key) pair attended
    weight bytes     each dense matrix once; of the experts, those that are touched
    KV bytes         each decode reads its whole context; each new token is written once
    activation bytes what each operator reads and writes beside weights and KV

`WorkCoefficients.work` is the physics: causal prefill attends half of its square,
sliding layers stop at their window, and a step of T tokens that choose k of E
experts touches E * (1 - (1 - k/E)^T) of them. `WorkCoefficients.vllm_totals` keeps
the conventions of `vllm.v1.metrics.perf.ModelMetrics` (no causal halving, min(T*k, E)
experts), so that a test can equate the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shaper.core.model.shape import ModelShape
from shaper.core.types import StepBatch

__all__ = ["Gemm", "ModelShape", "StepWork", "VllmTotals", "WorkCoefficients"]


# Two norms and two residual additions read and write the hidden state, the rotary
# embedding the heads: about ten passes over one row of the hidden size per layer.
_ELEMENTWISE_WIDTHS = 10


@dataclass(frozen=True, slots=True)
class Gemm:
    """One weight matrix of `outputs` x `inputs` on one GPU, in `count` layers.

    It sees every token of the step; with `logits_only` those whose logits are needed.
    """

    name: str
    outputs: int
    inputs: int
    count: int
    bytes_per_value: float
    """Of a weight, scales included; means over its layers."""
    logits_only: bool = False

    @property
    def values(self) -> int:
        """Weights in all its layers together."""
        return self.outputs * self.inputs * self.count

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights in all its layers together."""
        return self.values * self.bytes_per_value


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of one step on one GPU: FLOPs and bytes, all layers together."""

    gemm_flops: float
    attention_flops: float
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    touched_experts: float = 0.0
    """Expected distinct experts that a mixture-of-experts layer reads."""

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.gemm_flops + self.attention_flops

    @property
    def bytes(self) -> float:
        """All memory traffic."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True)
class VllmTotals:
    """FLOPs and bytes of a step on one GPU, counted as vLLM's `ModelMetrics` does."""

    flops: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class WorkCoefficients:
    """A model's work per token, per context token and per step, on one GPU.

    Made once at start-up with `from_shape`; `work` then costs a few multiplications.
    """

    shape: ModelShape
    tensor_parallel: int
    heads: int
    kv_heads: int
    gemms: tuple[Gemm, ...]
    dense_flops_per_token: float
    logits_flops_per_token: float
    expert_flops_per_token: float
    flops_per_pair_full: float
    flops_per_pair_sliding: float
    dense_weight_bytes: float
    expert_weight_bytes: float
    """Of one expert, in all layers together."""
    kv_bytes_per_token_full: float
    kv_bytes_per_token_sliding: float
    activation_bytes_per_token: float
    activation_bytes_per_logit: float
    elementwise_bytes_per_token: float
    """Of the kernels between GEMMs and attention: norms, residuals, activation."""
    expert_parallel: int = 1

    @classmethod
    def from_shape(
        cls, shape: ModelShape, tensor_parallel: int = 1, *, expert_parallel: int = 1
    ) -> WorkCoefficients:
        """The coefficients of one GPU out of `tensor_parallel`.

        With `expert_parallel` above 1 the experts are spread whole over that many
        engines, each with a batch like this one's (data parallel for the rest).

        Raises:
            ValueError: `tensor_parallel` does not divide the attention heads.
        """
        if tensor_parallel < 1 or shape.attention_heads % tensor_parallel:
            raise ValueError(
                f"tensor parallel {tensor_parallel} does not divide the "
                f"{shape.attention_heads} attention heads of {shape.name}"
            )
        tp = tensor_parallel
        heads = shape.attention_heads // tp
        kv_heads = max(1, shape.kv_heads // tp)
        width, head_dim = shape.hidden_size, shape.head_dim
        ffn, expert_ffn = shape.intermediate_size // tp, shape.expert_intermediate_size // tp
        if expert_parallel > 1:
            expert_ffn = shape.expert_intermediate_size
        dense_layers = shape.layers - shape.moe_layers
        shared = expert_ffn * shape.shared_experts
        gemms = _gemms(shape, tp, heads, kv_heads, shared)
        per_token = sum(gemm.values for gemm in gemms if not gemm.logits_only)
        logits = gemms[-1].values
        expert_values = 3 * width * expert_ffn * shape.moe_layers
        full_layers = shape.layers - shape.sliding_layers
        pair_flops = 4.0 * heads * head_dim
        kv_bytes = 2.0 * kv_heads * head_dim * shape.kv_bytes_per_value
        a = shape.activation_bytes_per_value
        return cls(
            shape=shape,
            tensor_parallel=tp,
            heads=heads,
            kv_heads=kv_heads,
            gemms=gemms,
            dense_flops_per_token=2.0 * per_token,
            logits_flops_per_token=2.0 * logits,
            expert_flops_per_token=2.0 * expert_values * shape.experts_per_token,
            flops_per_pair_full=pair_flops * full_layers,
            flops_per_pair_sliding=pair_flops * shape.sliding_layers,
            dense_weight_bytes=sum(gemm.weight_bytes for gemm in gemms),
            expert_weight_bytes=expert_values * shape.weights.experts,
            kv_bytes_per_token_full=kv_bytes * full_layers,
            kv_bytes_per_token_sliding=kv_bytes * shape.sliding_layers,
            activation_bytes_per_token=a * _activation_values_per_token(shape, tp),
            activation_bytes_per_logit=a * (width + gemms[-1].outputs),
            elementwise_bytes_per_token=a
            * (
                _ELEMENTWISE_WIDTHS * width * shape.layers
                + 3 * ffn * dense_layers
                + 3 * (expert_ffn * shape.experts_per_token + shared) * shape.moe_layers
            ),
            expert_parallel=expert_parallel,
        )

    def work(self, batch: StepBatch) -> StepWork:
        """The work of `batch` on this GPU, as physics has it (see the module's laws).

        Sums don't tell requests apart: a sliding layer is taken to see the smaller
        of its window and the mean context of the prefills, or of the decodes.
        """
        return StepWork(*self.work_parts(batch))

    def work_parts(self, batch: StepBatch) -> tuple[float, float, float, float, float, float]:
        """The fields of `work` as a tuple, for the step model's inner loop."""
        tokens = batch.decode_tokens + batch.prefill_tokens
        if tokens == 0:
            return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        logits = batch.decode_tokens + batch.prefill_requests
        decode_context = float(batch.decode_context_tokens)
        decode_pairs = decode_context
        if batch.decode_requests and batch.decode_tokens != batch.decode_requests:
            decode_pairs = decode_context * batch.decode_tokens / batch.decode_requests
        prefill_pairs = (
            batch.prefill_token_context_product
            - (batch.prefill_squared_tokens - batch.prefill_tokens) * 0.5
        )
        prefill_context = float(batch.prefill_context_tokens)
        attention = (decode_pairs + prefill_pairs) * self.flops_per_pair_full
        kv = (
            decode_context + prefill_context + tokens
        ) * self.kv_bytes_per_token_full + tokens * self.kv_bytes_per_token_sliding
        if self.flops_per_pair_sliding:
            window = float(self.shape.sliding_window_tokens or 0)
            decode_share, prefill_share = _window_shares(batch, prefill_pairs, window)
            attention += self.flops_per_pair_sliding * (
                decode_pairs * decode_share + min(prefill_pairs, batch.prefill_tokens * window)
            )
            kv += self.kv_bytes_per_token_sliding * (
                decode_context * decode_share + prefill_context * prefill_share
            )
        experts = self.touched_experts(tokens) if self.expert_weight_bytes else 0.0
        return (
            tokens * (self.dense_flops_per_token + self.expert_flops_per_token)
            + logits * self.logits_flops_per_token,
            attention,
            self.dense_weight_bytes + experts * self.expert_weight_bytes,
            kv,
            tokens * self.activation_bytes_per_token + logits * self.activation_bytes_per_logit,
            experts,
        )

    def touched_experts(self, tokens: int) -> float:
        """Expected distinct experts of a layer that `tokens` tokens choose, if they
        choose evenly: E * (1 - (1 - k/E)^T); of those, this GPU's share."""
        experts = self.shape.experts
        if not experts or not self.shape.moe_layers:
            return 0.0
        chosen = self.shape.experts_per_token / experts
        spread = self.expert_parallel
        return experts / spread * (1.0 - (1.0 - chosen) ** (tokens * spread))

    def vllm_totals(self, requests: Iterable[tuple[int, int, bool]]) -> VllmTotals:
        """What vLLM's `ModelMetrics` counts for these requests on one GPU.

        Args:
            requests: (tokens in the step, context they end at, is it a prefill).
        """
        rows = list(requests)
        tokens = sum(row[0] for row in rows)
        prefill = [row for row in rows if row[2]]
        logits = tokens - sum(row[0] for row in prefill) + len(prefill)
        window = self.shape.sliding_window_tokens
        pairs_full = sum(count * context for count, context, _ in rows)
        context_full = sum(context for _, context, _ in rows)
        pairs_sliding = context_sliding = 0
        if window is not None:
            pairs_sliding = sum(count * min(context, window) for count, context, _ in rows)
            context_sliding = sum(min(context, window) for _, context, _ in rows)
        shape = self.shape
        router = 2.0 * shape.experts * shape.hidden_size * shape.moe_layers
        experts = min(tokens * shape.experts_per_token, shape.experts)
        flops = (
            tokens * (self.dense_flops_per_token - router + self.expert_flops_per_token)
            + logits * self.logits_flops_per_token
            + pairs_full * self.flops_per_pair_full
            + pairs_sliding * self.flops_per_pair_sliding
        )
        reads, writes = _vllm_activation_values(shape, self.tensor_parallel)
        a = shape.activation_bytes_per_value
        new_kv = self.kv_bytes_per_token_full + self.kv_bytes_per_token_sliding
        read_bytes = (
            self.dense_weight_bytes
            - router * 0.5 * shape.weights.plain
            + experts * self.expert_weight_bytes
            + tokens * reads * a
            + logits * shape.hidden_size * a
            + context_full * self.kv_bytes_per_token_full
            + context_sliding * self.kv_bytes_per_token_sliding
        )
        write_bytes = tokens * (writes * a + new_kv) + logits * self.gemms[-1].outputs * a
        return VllmTotals(int(flops), int(read_bytes), int(write_bytes))


def _window_shares(batch: StepBatch, prefill_pairs: float, window: float) -> tuple[float, float]:
    """The share of the decodes' and of the prefills' context inside the window."""
    decode_share = prefill_share = 1.0
    if batch.decode_context_tokens > window * batch.decode_requests:
        decode_share = window * batch.decode_requests / batch.decode_context_tokens
    reach = window * batch.prefill_requests + batch.prefill_tokens
    if batch.prefill_context_tokens > reach:
        prefill_share = reach / batch.prefill_context_tokens
    return decode_share, prefill_share


def _vllm_activation_values(shape: ModelShape, tp: int) -> tuple[int, int]:
    """Values read and written per token, all layers, as vLLM counts operators:
    qkv, attention, output projection, gate and up, SiLU, down."""
    width = shape.hidden_size
    heads = shape.attention_heads // tp
    kv_heads = max(1, shape.kv_heads // tp)
    q_values, kv_values = heads * shape.head_dim, kv_heads * shape.head_dim
    reads = (width + 2 * q_values) * shape.layers
    writes = (q_values + 2 * kv_values + width) * shape.layers
    ffn, expert_ffn = shape.intermediate_size // tp, shape.expert_intermediate_size // tp
    dense, moe = shape.layers - shape.moe_layers, shape.moe_layers
    reads += (width + 3 * ffn) * dense
    writes += (3 * ffn + width) * dense
    chosen, shared = shape.experts_per_token, shape.shared_experts
    reads += (width + 3 * expert_ffn) * chosen * moe
    writes += (3 * expert_ffn + width) * chosen * moe
    if shared:
        reads += (width + 2 * expert_ffn * shared + expert_ffn) * moe
        writes += (3 * expert_ffn + width) * shared * moe
    return reads, writes


def _gemms(
    shape: ModelShape, tensor_parallel: int, heads: int, kv_heads: int, shared: int
) -> tuple[Gemm, ...]:
    """The GEMMs of one GPU, those of the logits last.

    Args:
        shape: of the model.
        tensor_parallel: GPUs that share each layer.
        heads: attention heads of this GPU.
        kv_heads: KV heads of this GPU.
        shared: width of the shared experts on this GPU; 0: there are none.
    """
    width, head_dim, of = shape.hidden_size, shape.head_dim, shape.weights
    ffn, dense_layers = shape.intermediate_size // tensor_parallel, shape.layers - shape.moe_layers
    gemms = [
        Gemm("qkv", (heads + 2 * kv_heads) * head_dim, width, shape.layers, of.attention),
        Gemm("attention output", width, heads * head_dim, shape.layers, of.output),
    ]
    if dense_layers:
        gemms.append(Gemm("gate and up", 2 * ffn, width, dense_layers, of.gate_up))
        gemms.append(Gemm("down", width, ffn, dense_layers, of.down))
    if shape.moe_layers:
        moe = shape.moe_layers
        gemms.append(Gemm("router", shape.experts, width, moe, of.plain))
        if shared:
            gemms.append(Gemm("shared gate and up", 2 * shared, width, moe, of.shared))
            gemms.append(Gemm("shared down", width, shared, moe, of.shared))
    vocabulary = math.ceil(shape.vocab_size / tensor_parallel)
    return (*gemms, Gemm("logits", vocabulary, width, 1, of.head, logits_only=True))


def _activation_values_per_token(shape: ModelShape, tp: int) -> int:
    """Values that move per token beside weights and KV."""
    reads, writes = _vllm_activation_values(shape, tp)
    return reads + writes
