"""A GPU as numbers: what `StepModel` and the emulated GPU need to know of it.

A profile is one value made of small groups, and every number is in SI units. The
data files that hold them, each number with its source, are read by
`shaper.gpu.profiles`; docs/profiles.md describes the format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


class _Checked:
    """Refuses numbers that no GPU can have: not finite, or below zero."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value) or (value < 0 and not field.name.endswith("_celsius")):
                raise ValueError(f"{field.name} is {value}, not a finite number of at least 0")
            if field.name.endswith("_ratio") and value > 1:
                raise ValueError(f"{field.name} is {value}, above 1")


@dataclass(frozen=True, slots=True)
class MemorySpec(_Checked):
    """Memory size and the bandwidths that kernels reach."""

    capacity_bytes: float
    bandwidth_bytes_per_second: float
    """As the vendor states it."""
    gemm_ratio: float
    """Share of it that a GEMM of few rows reaches."""
    attention_ratio: float
    """Share of it that decode attention over long contexts reaches."""
    expert_ratio: float
    """Share of it that grouped expert GEMMs reach."""
    activation_ratio: float
    """Share of the activation traffic that goes to memory, not to the L2 cache."""
    clock_knee_ratio: float
    """Below this share of the highest SM clock, bandwidth falls with the clock."""


@dataclass(frozen=True, slots=True)
class ComputeSpec(_Checked):
    """Arithmetic rates at the highest SM clock, dense bfloat16."""

    flops_per_second: float
    """As the vendor states it, scaled to the highest SM clock."""
    gemm_ratio: float
    attention_ratio: float
    """Share of it that prefill attention over long contexts reaches."""
    expert_ratio: float
    attention_tile_tokens: float
    """Keys that each query attends in vain at its causal edge (half a tile or so)."""
    expert_tile_tokens: float
    """Rows that a touched expert's GEMM costs in vain."""


@dataclass(frozen=True, slots=True)
class KernelSpec(_Checked):
    """Time that a kernel takes whatever its size, at the highest SM clock."""

    gemm_seconds: float
    attention_seconds: float
    attention_request_seconds: float
    """Added per sequence and KV head in decode attention."""
    layer_seconds: float
    """Norms, rotary embedding, activation, cache write: the rest of one layer."""
    expert_layer_seconds: float
    """Routing and permutation, per layer with experts."""
    step_seconds: float
    """Embedding, gather, copies: once a step."""
    sampler_seconds_per_logit: float
    """Softmax, top-k and top-p over the vocabulary, per sampled row and entry."""


@dataclass(frozen=True, slots=True)
class HostSpec(_Checked):
    """Time of the engine's process around a step."""

    step_seconds: float
    request_seconds: float
    """Per request of the batch."""
    prefill_seconds: float
    """Added to a step that has prefills (no full CUDA graph)."""
    returned_request_seconds: float
    """Per request that comes back to the batch: its token ids are copied again."""
    overlap_ratio: float
    """Share that runs while the GPU computes the step before (async scheduling)."""


@dataclass(frozen=True, slots=True)
class LinkSpec(_Checked):
    """GPU to GPU, for tensor parallelism."""

    bandwidth_bytes_per_second: float
    """Per GPU and direction, as reached."""
    allreduce_seconds: float
    """Latency of one all-reduce among two GPUs."""
    allreduce_gpu_seconds: float
    """Added latency for each GPU beyond two."""

    def exchange_seconds(
        self, exchanges: int, partners: int, row_bytes: float
    ) -> tuple[float, float]:
        """Seconds of a step's exchanges, and seconds that each token adds.

        Args:
            exchanges: in a step.
            partners: GPUs that take part in each.
            row_bytes: that a token brings into one.
        """
        fixed = exchanges * (
            self.allreduce_seconds + self.allreduce_gpu_seconds * max(0, partners - 2)
        )
        passes = 2.0 * (partners - 1) / partners
        return fixed, exchanges * row_bytes * passes / self.bandwidth_bytes_per_second


@dataclass(frozen=True, slots=True)
class PowerSpec(_Checked):
    """One GPU's power at the highest SM clock and the reference temperature."""

    limit_watts: float
    """Enforced limit by default (TDP)."""
    min_limit_watts: float
    idle_watts: float
    """No process holds a context."""
    context_watts: float
    """A context is held and nothing has run for long."""
    gap_watts: float
    """In the milliseconds between steps: clocks are up, nothing runs."""
    gap_hold_seconds: float
    """How long the gap level holds before power falls to the context level."""
    active_watts: float
    """Added while any kernel runs, at the highest clock."""
    joules_per_byte: float
    """Of weights and activations."""
    joules_per_kv_byte: float
    """Of the KV cache: decode attention multiplies each with a tile of mostly padded
    query rows, so that a byte costs more than one of weights."""
    joules_per_flop: float
    sampler_watts: float
    """Added, beside `active_watts`, while the sampler runs."""
    byte_core_ratio: float
    """Share of a byte's energy spent on the core's voltage (L2, crossbar)."""
    leakage_watts_per_celsius: float
    reference_celsius: float


@dataclass(frozen=True, slots=True)
class ClockSpec(_Checked):
    """SM clock and its voltage."""

    sm_max_hertz: float
    sm_min_hertz: float
    step_hertz: float
    memory_hertz: float
    voltage_floor_ratio: float
    """Lowest voltage over that at the highest clock."""
    voltage_slope: float
    """Fall of the voltage ratio per fall of the clock ratio, down to the floor."""
    rest_hertz: float = 0.0
    """SM clock of a GPU that draws its context power only; 0: it does not fall at rest."""
    climb_seconds: float = 0.0
    """From there to the highest clock, once work comes."""


@dataclass(frozen=True, slots=True)
class CapSpec(_Checked):
    """The driver's power-cap controller."""

    period_seconds: float
    """Between two decisions."""
    window_seconds: float
    """Time constant of the power average it acts on."""
    slew_down_hertz: float
    """Largest fall of the clock in one decision."""
    slew_up_hertz: float
    margin_ratio: float
    """It settles this share below the limit."""
    brake_clock_ratio: float
    """Share of the highest clock that is left under a power brake or hardware slowdown."""


@dataclass(frozen=True, slots=True)
class HeatSpec(_Checked):
    """Two-stage RC: die to heat sink to ambient."""

    ambient_celsius: float
    die_kelvin_per_watt: float
    die_joules_per_kelvin: float
    sink_kelvin_per_watt: float
    sink_joules_per_kelvin: float
    slowdown_celsius: float
    """Software thermal slowdown starts."""
    hardware_slowdown_celsius: float
    shutdown_celsius: float


@dataclass(frozen=True, slots=True)
class MeterSpec(_Checked):
    """What the driver's meter does to the true power."""

    instant_window_seconds: float
    instant_refresh_seconds: float
    average_window_seconds: float
    average_refresh_seconds: float
    energy_refresh_seconds: float
    gain_error_ratio: float
    """Largest relative error of a GPU's meter; each GPU has its own, fixed one."""
    offset_error_watts: float


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """One kind of GPU. Built by `shaper.gpu.profiles.load_profile`.

    Raises:
        ValueError: a number is impossible, or two contradict each other.
    """

    name: str
    nvml_names: tuple[str, ...]
    """What the driver calls it, in full; matched without regard to case."""
    memory: MemorySpec
    compute: ComputeSpec
    kernel: KernelSpec
    host: HostSpec
    link: LinkSpec
    power: PowerSpec
    clocks: ClockSpec
    cap: CapSpec
    heat: HeatSpec
    meter: MeterSpec

    def __post_init__(self) -> None:
        """Checks what no single number shows."""
        positive = (
            ("memory.bandwidth_bytes_per_second", self.memory.bandwidth_bytes_per_second),
            ("memory.gemm_ratio", self.memory.gemm_ratio),
            ("memory.attention_ratio", self.memory.attention_ratio),
            ("memory.expert_ratio", self.memory.expert_ratio),
            ("compute.flops_per_second", self.compute.flops_per_second),
            ("compute.gemm_ratio", self.compute.gemm_ratio),
            ("compute.attention_ratio", self.compute.attention_ratio),
            ("compute.expert_ratio", self.compute.expert_ratio),
            ("link.bandwidth_bytes_per_second", self.link.bandwidth_bytes_per_second),
            ("clocks.sm_min_hertz", self.clocks.sm_min_hertz),
            ("clocks.step_hertz", self.clocks.step_hertz),
            ("clocks.voltage_floor_ratio", self.clocks.voltage_floor_ratio),
            ("cap.period_seconds", self.cap.period_seconds),
            ("cap.brake_clock_ratio", self.cap.brake_clock_ratio),
            ("meter.instant_refresh_seconds", self.meter.instant_refresh_seconds),
            ("meter.instant_window_seconds", self.meter.instant_window_seconds),
            ("meter.average_window_seconds", self.meter.average_window_seconds),
        )
        for name, value in positive:
            if value <= 0:
                raise ValueError(f"{self.name}: {name} must be above 0")
        power = self.power
        ladder = (power.idle_watts, power.context_watts, power.gap_watts, power.limit_watts)
        if list(ladder) != sorted(ladder):
            raise ValueError(
                f"{self.name}: idle, context, gap and limit watts must not fall: {ladder}"
            )
        if self.clocks.sm_min_hertz > self.clocks.sm_max_hertz:
            raise ValueError(f"{self.name}: the lowest SM clock is above the highest")
        if self.clocks.rest_hertz > self.clocks.sm_max_hertz:
            raise ValueError(f"{self.name}: the SM clock at rest is above the highest")
        heat = self.heat
        if not heat.slowdown_celsius <= heat.hardware_slowdown_celsius <= heat.shutdown_celsius:
            raise ValueError(f"{self.name}: slowdown and shutdown temperatures are out of order")
