"""Seconds and joules of a step, from its work and a GPU's profile.

Laws, per GPU, at SM clock ratio r (1 at the highest clock), voltage ratio v(r):

    GEMM        n * (overhead / r + norm4(bytes / bandwidth, FLOPs / (rate * r)))
    attention   n * overhead / r + KV bytes / bandwidth + FLOPs / (rate * r)
    device      GEMMs + attention + experts + other kernels + all-reduce + sampler
    step        max(device, overlapped host) + serial host
    joules      gap_watts * step + active_watts * r * v^2 * device
                + e_byte * bytes * (1 - c + c * v^2) + e_flop * FLOPs * v^2
                + leakage * (temperature - reference) * step

norm4(a, b) = (a^4 + b^4)^(1/4): the slower of the two, rounded off where they cross.
GEMM bytes are the weights once and the share of the activations that misses the L2
cache. Bandwidth falls with the clock only below a knee.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from shaper.core.model.profile import GpuProfile
from shaper.core.model.step_breakdown import StepBreakdown, StepTerm, bound_by
from shaper.core.model.work import Gemm, WorkCoefficients
from shaper.core.types import StepBatch, StepPrediction

__all__ = ["GpuProfile", "StepBreakdown", "StepModel", "StepTerm"]


# Sizes of steps whose GEMM seconds are remembered. A scheduler asks about the same few
# chunk sizes beside the same decodes again and again; 8,192 of them take two megabytes.
_REMEMBERED_SIZES = 8192


class StepModel:
    """Predicts a step of one engine: pure floats, no I/O.

    `predict` costs two or three microseconds; a scheduler calls it several times a step.
    The only state is the GEMM seconds of the step sizes and clocks that were asked about.
    """

    def __init__(
        self,
        profile: GpuProfile,
        coefficients: WorkCoefficients,
        tensor_parallel: int | None = None,
    ) -> None:
        """Takes the coefficients of one GPU.

        Raises:
            ValueError: `tensor_parallel` is given and is not that of the coefficients.
        """
        tp = coefficients.tensor_parallel
        if tensor_parallel is not None and tensor_parallel != tp:
            raise ValueError(
                f"tensor parallel {tensor_parallel}, but the coefficients are for {tp}"
            )
        self.profile = profile
        self.coefficients = coefficients
        self.gpu_count = tp
        shape = coefficients.shape
        memory, compute, kernel = profile.memory, profile.compute, profile.kernel
        self._bandwidth = memory.bandwidth_bytes_per_second
        self._gemm_bandwidth = self._bandwidth * memory.gemm_ratio
        self._attention_byte_seconds = 1.0 / (self._bandwidth * memory.attention_ratio)
        self._gemm_rate = compute.flops_per_second * compute.gemm_ratio
        self._attention_flop_seconds = 1.0 / (compute.flops_per_second * compute.attention_ratio)
        self._token_gemms = tuple(
            self._gemm_terms(gemm) for gemm in coefficients.gemms if not gemm.logits_only
        )
        self._logits_gemm = self._gemm_terms(coefficients.gemms[-1])
        layers = shape.layers
        self._gemm_overhead = kernel.gemm_seconds * sum(gemm.count for gemm in coefficients.gemms)
        self._layer_overhead = (
            layers * kernel.layer_seconds
            + shape.moe_layers * kernel.expert_layer_seconds
            + kernel.step_seconds
        )
        self._elementwise_seconds = coefficients.elementwise_bytes_per_token / self._gemm_bandwidth
        self._attention_overhead = layers * kernel.attention_seconds
        self._attention_request = layers * coefficients.kv_heads * kernel.attention_request_seconds
        self._sampler_row = kernel.sampler_seconds_per_logit * shape.vocab_size
        # One all-reduce after attention and one after the feed-forward part; experts
        # that are spread over engines gather and scatter their tokens instead.
        spread = coefficients.expert_parallel
        exchanges = (2 * layers if tp > 1 else 0) + (2 * shape.moe_layers if spread > 1 else 0)
        row_bytes = shape.hidden_size * shape.activation_bytes_per_value * spread
        self._reduce_seconds, self._reduce_token_seconds = profile.link.exchange_seconds(
            exchanges, max(tp, spread), row_bytes
        )
        self._expert_byte_seconds = 1.0 / (self._bandwidth * memory.expert_ratio)
        self._expert_flop_seconds = 1.0 / (compute.flops_per_second * compute.expert_ratio)
        self._clock_reciprocal = 1.0 / profile.clocks.sm_max_hertz
        self._knee_ratio = memory.clock_knee_ratio
        self._activation_ratio = memory.activation_ratio
        self._tile_flops = (
            compute.attention_tile_tokens,
            (coefficients.flops_per_pair_full + coefficients.flops_per_pair_sliding),
        )
        self._overhead = self._gemm_overhead + self._layer_overhead + self._attention_overhead
        self._gemm_seconds: dict[tuple[int, float], tuple[float, float]] = {}

    @property
    def idle_watts(self) -> float:
        """All GPUs, a context held and nothing run for long."""
        return self.gpu_count * self.profile.power.context_watts

    @property
    def gap_watts(self) -> float:
        """All GPUs, in the milliseconds between two steps."""
        return self.gpu_count * self.profile.power.gap_watts

    def gemm_seconds(self, gemm: Gemm, rows: int, clock_ratio: float = 1.0) -> float:
        """Seconds of one layer's GEMM of `rows` rows."""
        weights, per_row, flop_seconds = self._gemm_terms(gemm)
        memory = (weights + rows * per_row) / gemm.count
        compute = rows * flop_seconds / gemm.count / clock_ratio
        return self.profile.kernel.gemm_seconds / clock_ratio + _norm4(memory, compute)

    def predict(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepPrediction:
        """Seconds and joules of `batch`, all GPUs together; by default at the highest clock."""
        power = self.profile.power
        if batch.decode_tokens + batch.prefill_tokens == 0:
            seconds = self._host_seconds(batch)
            return StepPrediction(seconds, seconds * self.gap_watts)
        ratio = 1.0 if sm_clock_hertz is None else sm_clock_hertz * self._clock_reciprocal
        memory, compute, attention, overhead, reduce, sampler, byte_joules, flop_joules = (
            self._parts(batch, ratio)
        )
        device = memory + compute + attention + overhead + reduce + sampler
        host = self._host_seconds(batch)
        hidden = host * self.profile.host.overlap_ratio
        seconds = (device if device > hidden else hidden) + host - hidden
        squared = 1.0
        if ratio != 1.0:
            voltage = self.voltage_ratio(ratio)
            squared = voltage * voltage
        base = power.gap_watts
        if temperature_celsius is not None:
            base += power.leakage_watts_per_celsius * (
                temperature_celsius - power.reference_celsius
            )
        core = power.byte_core_ratio
        joules = (
            base * seconds
            + (power.active_watts * device + power.sampler_watts * sampler) * ratio * squared
            + byte_joules * (1.0 - core + core * squared)
            + flop_joules * squared
        )
        return StepPrediction(seconds, joules * self.gpu_count)

    def voltage_ratio(self, clock_ratio: float) -> float:
        """Core voltage over that at the highest clock."""
        clocks = self.profile.clocks
        voltage = 1.0 - clocks.voltage_slope * (1.0 - clock_ratio)
        floor = clocks.voltage_floor_ratio
        return voltage if voltage > floor else floor

    def breakdown(
        self,
        batch: StepBatch,
        *,
        sm_clock_hertz: float | None = None,
        temperature_celsius: float | None = None,
    ) -> StepBreakdown:
        """The same prediction, taken apart into named terms, with what binds it."""
        whole = self.predict(
            batch, sm_clock_hertz=sm_clock_hertz, temperature_celsius=temperature_celsius
        )
        if batch.tokens == 0:
            term = StepTerm("host", whole.seconds, whole.joules)
            return StepBreakdown(whole, (term,), "host")
        ratio = 1.0 if sm_clock_hertz is None else sm_clock_hertz * self._clock_reciprocal
        memory, compute, attention, overhead, reduce, sampler, _, _ = self._parts(batch, ratio)
        power = self.profile.power
        squared = self.voltage_ratio(ratio) ** 2
        base = power.gap_watts
        if temperature_celsius is not None:
            base += power.leakage_watts_per_celsius * (
                temperature_celsius - power.reference_celsius
            )
        busy = base + power.active_watts * ratio * squared
        core = power.byte_core_ratio
        byte_scale = 1.0 - core + core * squared
        work = self.coefficients.work(batch)
        stored = work.weight_bytes + work.activation_bytes * self.profile.memory.activation_ratio
        count = self.gpu_count
        flop = power.joules_per_flop * squared
        sampling = busy + power.sampler_watts * ratio * squared
        host = whole.seconds - (memory + compute + attention + overhead + reduce + sampler)
        joules = (
            ("gemm memory", memory, memory * busy + stored * power.joules_per_byte * byte_scale),
            ("gemm compute", compute, compute * busy + work.gemm_flops * flop),
            (
                "attention",
                attention,
                attention * busy
                + work.kv_bytes * power.joules_per_kv_byte * byte_scale
                + work.attention_flops * flop,
            ),
            ("kernel overhead", overhead, overhead * busy),
            ("all-reduce", reduce, reduce * busy),
            ("sampler", sampler, sampler * sampling),
            ("host", host, host * base),
        )
        terms = tuple(StepTerm(name, seconds, value * count) for name, seconds, value in joules)
        return StepBreakdown(whole, terms, bound_by(batch, terms))

    def clock_under_limit(self, steps: Sequence[StepBatch], limit_watts: float) -> float:
        """The highest SM clock at which these steps, one after the other, draw at most
        `limit_watts` on average, all GPUs together; the lowest one if none does.

        Steps of 15 MHz or whatever the profile has; the highest clock when nothing binds.
        """
        clocks = self.profile.clocks
        low, high = clocks.sm_min_hertz, clocks.sm_max_hertz
        if self.mean_watts(steps, high) <= limit_watts:
            return high
        while high - low > clocks.step_hertz:
            middle = (low + high) / 2.0
            if self.mean_watts(steps, middle) > limit_watts:
                high = middle
            else:
                low = middle
        return low

    def mean_watts(self, steps: Sequence[StepBatch], sm_clock_hertz: float) -> float:
        """Mean power of steps that run one after the other, all GPUs together."""
        found = [self.predict(step, sm_clock_hertz=sm_clock_hertz) for step in steps]
        return sum(one.joules for one in found) / sum(one.seconds for one in found)

    def _gemm_terms(self, gemm: Gemm) -> tuple[float, float, float]:
        """Of all its layers: weight seconds, memory seconds per row, compute seconds
        per row at the highest clock."""
        shape = self.coefficients.shape
        weights = gemm.weight_bytes / self._gemm_bandwidth
        per_row = (
            (gemm.outputs + gemm.inputs)
            * gemm.count
            * shape.activation_bytes_per_value
            * self.profile.memory.activation_ratio
            / self._gemm_bandwidth
        )
        return weights, per_row, 2.0 * gemm.values / self._gemm_rate

    def _parts(
        self, batch: StepBatch, ratio: float
    ) -> tuple[float, float, float, float, float, float, float, float]:
        """Seconds of GEMM memory, GEMM compute, attention, overhead, all-reduce and
        sampler, then joules of bytes and of FLOPs; one GPU."""
        tokens = batch.decode_tokens + batch.prefill_tokens
        logits = batch.decode_tokens + batch.prefill_requests
        slow = 1.0 / ratio
        knee = self._knee_ratio
        stretch = 1.0 if ratio >= knee else knee * slow
        gemms = self._gemm_seconds.get((tokens, ratio))
        if gemms is None:
            gemms = self._token_gemm_seconds(tokens, stretch, slow)
            if len(self._gemm_seconds) >= _REMEMBERED_SIZES:
                self._gemm_seconds.clear()
            self._gemm_seconds[tokens, ratio] = gemms
        memory, compute = gemms
        weights, per_row, flop_seconds = self._logits_gemm
        a = (weights + logits * per_row) * stretch
        b = logits * flop_seconds * slow
        memory += _norm4(a, b)
        gemm_flops, attention_flops, weight_bytes, kv_bytes, activation_bytes, experts = (
            self.coefficients.work_parts(batch)
        )
        if experts:
            a, b = self._expert_seconds(experts, tokens, stretch, slow)
            memory += a
            compute += b
        tile_tokens, pair_flops = self._tile_flops
        attention = (
            kv_bytes * self._attention_byte_seconds * stretch
            + (attention_flops + batch.prefill_tokens * tile_tokens * pair_flops)
            * self._attention_flop_seconds
            * slow
            + batch.decode_requests * self._attention_request * slow
        )
        overhead = self._overhead * slow + tokens * self._elementwise_seconds * stretch
        reduce = 0.0
        if self._reduce_seconds:
            reduce = self._reduce_seconds + tokens * self._reduce_token_seconds
        power = self.profile.power
        byte_joules = (
            weight_bytes + activation_bytes * self._activation_ratio
        ) * power.joules_per_byte + kv_bytes * power.joules_per_kv_byte
        return (
            memory,
            compute,
            attention,
            overhead,
            reduce,
            logits * self._sampler_row * slow,
            byte_joules,
            (gemm_flops + attention_flops) * power.joules_per_flop,
        )

    def _expert_seconds(
        self, experts: float, tokens: int, stretch: float, slow: float
    ) -> tuple[float, float]:
        """Seconds of the experts' GEMMs, as memory's or as compute's: the larger of the two."""
        weight_bytes = self.coefficients.expert_weight_bytes
        a = experts * weight_bytes * self._expert_byte_seconds
        rows = tokens * self.coefficients.expert_flops_per_token
        padding = (
            2.0
            * experts
            * self.profile.compute.expert_tile_tokens
            * weight_bytes
            / self.coefficients.shape.weights.experts
        )
        b = (rows + padding) * self._expert_flop_seconds * slow
        a *= stretch
        whole = _norm4(a, b)
        return (whole, 0.0) if a > b else (0.0, whole)

    def _token_gemm_seconds(self, tokens: int, stretch: float, slow: float) -> tuple[float, float]:
        """Seconds of memory and of compute of the GEMMs that every token goes through."""
        memory = compute = 0.0
        for weights, per_row, flop_seconds in self._token_gemms:
            a = (weights + tokens * per_row) * stretch
            b = tokens * flop_seconds * slow
            a4 = a * a * a * a
            b4 = b * b * b * b
            whole = sqrt(sqrt(a4 + b4))
            share = a4 / (a4 + b4)
            memory += whole * share
            compute += whole - whole * share
        return memory, compute

    def _host_seconds(self, batch: StepBatch) -> float:
        host = self.profile.host
        seconds = (
            host.step_seconds
            + (batch.decode_requests + batch.prefill_requests) * host.request_seconds
        )
        if batch.prefill_requests:
            seconds += host.prefill_seconds
        if batch.returned_requests:
            seconds += batch.returned_requests * host.returned_request_seconds
        return seconds


def _norm4(a: float, b: float) -> float:
    return sqrt(sqrt(a * a * a * a + b * b * b * b))
