"""One engine step on one kind of GPU: the question, its checks and the answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from shaper.core.model.power_model import GpuProfile, StepModel
from shaper.core.model.shape import ModelShape
from shaper.core.model.step_breakdown import StepBreakdown
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import StepBatch
from shaper.emulator.shapes import load_shape
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile

_MEMORY_RATIO = 0.9  # vLLM's default --gpu-memory-utilization


@dataclasses.dataclass(frozen=True, slots=True)
class StepSpec:
    """One step on one kind of GPU. A context counts the tokens of the step itself."""

    gpu: str
    model: str
    tensor_parallel: int = 1
    decode_requests: int = 0
    context_tokens: int = 1024
    prefill_tokens: int = 0
    prefill_before_tokens: int = 0
    """Context of the prefill chunk that was computed in earlier steps."""
    returned_requests: int = 0
    sm_clock_hertz: float | None = None
    temperature_celsius: float | None = None
    power_cap_watts: float | None = None
    """Per GPU; None for the profile's limit."""

    def batch(self) -> StepBatch:
        """What the step computes."""
        ends = self.prefill_before_tokens + self.prefill_tokens
        return StepBatch(
            decode_requests=self.decode_requests,
            decode_tokens=self.decode_requests,
            decode_context_tokens=self.decode_requests * self.context_tokens,
            prefill_requests=1 if self.prefill_tokens else 0,
            prefill_tokens=self.prefill_tokens,
            prefill_context_tokens=ends if self.prefill_tokens else 0,
            prefill_token_context_product=self.prefill_tokens * ends,
            prefill_squared_tokens=self.prefill_tokens**2,
            returned_requests=self.returned_requests,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class StepAnswer:
    """The prediction, its terms, and the clock that it was made for."""

    question: StepSpec
    explanation: StepBreakdown
    gpu_count: int
    sm_clock_hertz: float
    bound_by: str
    shape: ModelShape

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints. Tokens are those that the step computes, of both kinds."""
        found = self.explanation.prediction
        tokens = self.question.decode_requests + self.question.prefill_tokens
        return {
            "gpu": self.question.gpu,
            "model": self.question.model,
            "parameters": self.shape.parameters,
            "bytes_per_weight": self.shape.weight_bytes_per_value,
            "kv_bytes_per_token": self.shape.kv_bytes_per_token_full,
            "tensor_parallel": self.gpu_count,
            "decode_requests": self.question.decode_requests,
            "context_tokens": self.question.context_tokens,
            "prefill_tokens": self.question.prefill_tokens,
            "seconds": found.seconds,
            "joules": found.joules,
            "watts_per_gpu": found.watts / self.gpu_count,
            "tokens_per_second": tokens / found.seconds,
            "tokens_per_joule": tokens / found.joules,
            "sm_clock_hertz": self.sm_clock_hertz,
            "bound_by": self.bound_by,
            "terms": {
                term.name: {
                    "seconds": term.seconds,
                    "joules": term.joules,
                    "seconds_share": term.seconds / found.seconds,
                    "joules_share": term.joules / found.joules,
                }
                for term in self.explanation.terms
            },
        }


def answer(question: StepSpec) -> StepAnswer:
    """Predicts the step that is asked for.

    Raises:
        UnknownGpuError, UnknownModelError: no such GPU or model.
        ConfigError: the step is impossible: no tokens, a context over the model's limit,
            a tensor-parallel size that does not divide the heads, too little memory, or a
            clock or cap that the GPU does not have.
    """
    profile = load_profile(question.gpu)
    shape = load_shape(question.model)
    try:
        coefficients = WorkCoefficients.from_shape(shape, question.tensor_parallel)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model = StepModel(profile, coefficients)
    _check(question, profile, model)
    batch = question.batch()
    ceiling = question.sm_clock_hertz or profile.clocks.sm_max_hertz
    limit = question.power_cap_watts or profile.power.limit_watts
    clock = min(ceiling, model.clock_under_limit([batch], limit * model.gpu_count))
    explanation = model.breakdown(
        batch, sm_clock_hertz=clock, temperature_celsius=question.temperature_celsius
    )
    bound_by = "power cap" if clock < ceiling else explanation.bound_by
    return StepAnswer(question, explanation, model.gpu_count, clock, bound_by, shape)


def _check(question: StepSpec, profile: GpuProfile, model: StepModel) -> None:
    shape = model.coefficients.shape
    if question.decode_requests + question.prefill_tokens == 0:
        raise ConfigError("nothing to compute: give --decode-requests or --prefill-tokens")
    longest = 0
    if question.decode_requests:
        longest = question.context_tokens
    if question.prefill_tokens:
        longest = max(longest, question.prefill_before_tokens + question.prefill_tokens)
    if longest > shape.max_context_tokens:
        raise ConfigError(
            f"a context of {longest} tokens is over {shape.name}'s limit of "
            f"{shape.max_context_tokens}"
        )
    clocks, power = profile.clocks, profile.power
    clock = question.sm_clock_hertz
    if clock is not None and not clocks.sm_min_hertz <= clock <= clocks.sm_max_hertz:
        raise ConfigError(
            f"--sm-clock-hertz {clock:g} is outside {profile.name}'s range of "
            f"{clocks.sm_min_hertz:g} to {clocks.sm_max_hertz:g}"
        )
    cap = question.power_cap_watts
    if cap is not None and not power.min_limit_watts <= cap <= power.limit_watts:
        raise ConfigError(
            f"--power-cap-watts {cap:g} is outside {profile.name}'s range of "
            f"{power.min_limit_watts:g} to {power.limit_watts:g}"
        )
    coefficients = model.coefficients
    held = question.decode_requests * question.context_tokens
    if question.prefill_tokens:
        held += question.prefill_before_tokens + question.prefill_tokens
    weights = shape.weight_bytes / model.gpu_count
    per_token = coefficients.kv_bytes_per_token_full
    cache = held * per_token
    if shape.sliding_window_tokens is not None:
        window = min(question.context_tokens, shape.sliding_window_tokens)
        cache += question.decode_requests * window * coefficients.kv_bytes_per_token_sliding
    usable = _MEMORY_RATIO * profile.memory.capacity_bytes
    if weights + cache > usable:
        raise ConfigError(
            f"{shape.name} does not fit: {weights / 1e9:.1f} GB of weights and "
            f"{cache / 1e9:.1f} GB of KV cache per GPU, and {profile.name} has room for "
            f"{usable / 1e9:.1f} GB ({_MEMORY_RATIO:.0%} of its memory); "
            "use more GPUs (--tp), fewer requests or a shorter context"
        )
