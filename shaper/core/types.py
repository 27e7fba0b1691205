"""What crosses module borders: frozen values with the unit in every name.

Times are seconds of the monotonic clock of the host (`CLOCK_MONOTONIC`), so
that values from different processes of one host can be compared.

What is made several times a step is a named tuple: a frozen dataclass takes several times as
long to make, and to look up in a dictionary.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import NamedTuple

from shaper.core.chunks import Blocks, least_chunk, take
from shaper.core.chunks import PrefillDemand as PrefillDemand


class ClockEventReasons(enum.IntFlag):
    """Why the clocks are below what was asked for: the bits of NVML's
    `nvmlClocksEventReason*` constants (nvml.h)."""

    NONE = 0
    GPU_IDLE = 0x1
    APPLICATIONS_CLOCKS_SETTING = 0x2
    SW_POWER_CAP = 0x4
    HW_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SW_THERMAL_SLOWDOWN = 0x20
    HW_THERMAL_SLOWDOWN = 0x40
    HW_POWER_BRAKE_SLOWDOWN = 0x80
    DISPLAY_CLOCK_SETTING = 0x100


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """One GPU that the engine runs on."""

    index: int
    name: str
    uuid: str
    enforced_limit_watts: float | None = None
    max_sm_clock_hertz: float | None = None
    slowdown_celsius: float | None = None
    """Where the driver starts to lower the clocks for heat."""


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one GPU. A field is None where that GPU can't report it.

    `instant_watts` and `average_watts` are what the driver's meter says; the
    window behind each depends on the GPU (25 ms and 1 s on Hopper).
    `energy_joules` and `*_throttle_seconds` count up from an arbitrary zero.
    """

    read_seconds: float
    gpu_index: int
    instant_watts: float | None = None
    average_watts: float | None = None
    energy_joules: float | None = None
    enforced_limit_watts: float | None = None
    sm_clock_hertz: float | None = None
    memory_clock_hertz: float | None = None
    temperature_celsius: float | None = None
    clock_event_reasons: ClockEventReasons = ClockEventReasons.NONE
    thermal_throttle_seconds: float | None = None
    brake_throttle_seconds: float | None = None
    power_cap_throttle_seconds: float | None = None
    memory_temperature_celsius: float | None = None
    slowdown_margin_celsius: float | None = None
    """How far the GPU is below where its driver lowers the clocks for heat."""


@dataclass(frozen=True, slots=True)
class PowerState:
    """The GPUs of one engine taken together, as the sampler last saw them.

    Watts and joules are sums over the GPUs, clocks the lowest, temperature
    the highest, reasons the union. Immutable, so that one thread can publish
    it and another read it with no lock.
    """

    sampled_seconds: float
    gpu_count: int
    instant_watts: float | None = None
    average_watts: float | None = None
    energy_joules: float | None = None
    enforced_limit_watts: float | None = None
    sm_clock_hertz: float | None = None
    temperature_celsius: float | None = None
    clock_event_reasons: ClockEventReasons = ClockEventReasons.NONE
    gpus: tuple[GpuSample, ...] = ()
    """What it is made of, so that one sick GPU among many shows."""
    slowdown_margin_celsius: float | None = None
    """The least of the GPUs'."""
    energy_integrated: bool = False
    """Energy of at least one GPU is not counted but summed up from its power readings."""
    energy_ratio: float = 1.0
    """What the counter of a GPU is multiplied by at the most, because its power reading says so."""

    def age_seconds(self, now_seconds: float) -> float:
        """Seconds since the sampler read this, never negative."""
        return max(0.0, now_seconds - self.sampled_seconds)


@dataclass(frozen=True, slots=True)
class PowerLimit:
    """The mean power over any window of this length must not exceed `watts`."""

    watts: float
    window_seconds: float

    def __str__(self) -> str:
        return f"{self.watts:g} W over {self.window_seconds:g} s"


@dataclass(frozen=True, slots=True)
class PowerBudget:
    """What an engine may draw: all limits hold at once. Without any, nothing is limited."""

    limits: tuple[PowerLimit, ...] = ()
    ramp_watts_per_second: float | None = None
    """How much the mean power of 100 ms may rise within a second; None: as it likes."""

    @property
    def empty(self) -> bool:
        """Whether nothing is limited."""
        return not self.limits and self.ramp_watts_per_second is None


@dataclass(frozen=True, slots=True)
class LatencyTargets:
    """What the operator promises at p99, and whether slack inside it may be spent for joules."""

    itl_seconds: float | None = None
    ttft_seconds: float | None = None
    spend_slack: bool = False
    """Let decodes wait up to the ITL target also where the budget is loose."""

    @property
    def empty(self) -> bool:
        """Whether nothing is promised."""
        return self.itl_seconds is None and self.ttft_seconds is None


NO_TARGETS = LatencyTargets()


class StepBatch(NamedTuple):
    """What one engine step computes, summed over its requests.

    A decode contributes one token (more with speculative decoding) and reads
    its whole context. A prefill chunk of `c` tokens that ends at context `k`
    contributes `c` tokens, `k` to the context sum, `c * k` to the product and
    `c * c` to the squares (`c * k - c * (c - 1) / 2` pairs are attended).
    Contexts include the tokens of the step itself.
    """

    decode_requests: int = 0
    decode_tokens: int = 0
    decode_context_tokens: int = 0
    prefill_requests: int = 0
    prefill_tokens: int = 0
    prefill_context_tokens: int = 0
    prefill_token_context_product: int = 0
    prefill_squared_tokens: int = 0
    returned_requests: int = 0
    """Requests that come back to the batch after having been held."""

    @property
    def tokens(self) -> int:
        """All tokens of the step."""
        return self.decode_tokens + self.prefill_tokens

    @property
    def requests(self) -> int:
        """All requests of the step."""
        return self.decode_requests + self.prefill_requests


class StepPrediction(NamedTuple):
    """What a step is expected to take, over all GPUs of the engine."""

    seconds: float
    joules: float

    @property
    def watts(self) -> float:
        """Mean power of the step, all GPUs together."""
        return self.joules / self.seconds if self.seconds > 0 else 0.0

    def joules_above(self, idle_watts: float) -> float:
        """What the step takes above the power between steps."""
        return self.joules - idle_watts * self.seconds


@dataclass(slots=True)
class EngineLoad:
    """What the engine would run in its next step if nothing held it back.

    `decode_*` sums over the requests that are ready to decode. `prefills` are in
    the order in which the engine would serve them. `token_budget` is the most
    tokens the engine puts in a step; `request_chunk_tokens` the most of one
    prompt (0: no such bound). Where `splittable` is false a prompt runs whole. Not to be changed.
    """

    decode_requests: int = 0
    decode_tokens: int = 0
    decode_context_tokens: int = 0
    prefills: tuple[PrefillDemand, ...] = ()
    token_budget: int = 8192
    request_chunk_tokens: int = 0
    splittable: bool = True
    returned_requests: int = 0
    running_requests: int = 0
    """Requests that hold a place in the engine's batch, whether they run in this step or not."""
    running_prefills: int = 0
    """How many of `prefills`, from the first, are of running requests."""
    waiting_requests: int = 0
    """Requests that the engine has not started, or has preempted."""
    oldest_arrival_seconds: float | None = None
    """When the first of the waiting requests arrived; None where nothing waits or it is unknown."""
    blocks: Blocks | None = None
    """Where the chunks of a prompt must end; None: anywhere."""
    more_waiting: bool = False
    """Waiting prompts that could run as well were not counted among `prefills`."""
    _batches: dict[int | None, StepBatch] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What `batch` has found: one decision asks about the same sizes several times."""

    def capped(self, running_requests: int) -> EngineLoad:
        """The same where no request enters while so many or more run."""
        entering = max(0, running_requests - self.running_requests)
        kept = self.running_prefills + entering
        if kept >= len(self.prefills):
            return self
        return dataclasses.replace(self, prefills=self.prefills[:kept])

    def batch(self, prefill_tokens: int | None = None) -> StepBatch:
        """The step with all decodes and at most `prefill_tokens` (None: what fits) of prompts."""
        if not self.prefills:
            prefill_tokens = None
        found = self._batches.get(prefill_tokens)
        if found is None:
            found = self._batches[prefill_tokens] = self._batch(prefill_tokens)
        return found

    def _batch(self, prefill_tokens: int | None) -> StepBatch:
        headroom = self.token_budget - self.decode_tokens
        if prefill_tokens is not None and prefill_tokens < headroom:
            headroom = prefill_tokens
        taken = take(
            self.prefills,
            headroom,
            most=self.request_chunk_tokens,
            splittable=self.splittable,
            running=self.running_prefills,
            step_tokens=self.decode_tokens + headroom,
            blocks=self.blocks,
        )
        # By position: with names the call takes half as long again.
        return StepBatch(
            self.decode_requests,
            self.decode_tokens,
            self.decode_context_tokens,
            *taken,
            self.returned_requests,
        )

    @property
    def least_chunk_tokens(self) -> int:
        """The fewest tokens that surely bring the first prompt on; 0: there is none."""
        return least_chunk(self.prefills, self.blocks)


class StepLimits(NamedTuple):
    """What a policy allows the next step. The default allows everything.

    `prefill_tokens`, `decode_requests`, `running_requests`: None is no bound, 0 is none at all.
    `run=False` is an empty step: the engine asks again a millisecond later.
    """

    run: bool = True
    prefill_tokens: int | None = None
    decode_requests: int | None = None
    running_requests: int | None = None
    """Requests that may run at once: while so many or more do, none enters."""

    @property
    def uncut(self) -> bool:
        """Whether prompts may run that were not counted: no bound on their tokens."""
        return self.run and self.prefill_tokens is None

    @property
    def binding(self) -> bool:
        """Whether this differs from letting the engine do as it likes."""
        return (
            not self.run
            or self.prefill_tokens is not None
            or self.decode_requests is not None
            or self.running_requests is not None
        )


UNLIMITED = StepLimits()
NOTHING = StepLimits(run=False)


class Reason(enum.StrEnum):
    """Why a step got the limits it got."""

    IDLE = "idle"
    """There is nothing to run."""
    UNCONSTRAINED = "unconstrained"
    """What the engine wants fits the budget and the ITL target."""
    CHUNK_POWER = "chunk_power"
    """Prompts were cut to the tokens that fit the budget."""
    CHUNK_ITL = "chunk_itl"
    """Prompts were cut to the tokens that keep the ITL target."""
    DECODE_ONLY = "decode_only"
    """Prompts wait: no efficient chunk fits the budget now."""
    ITL_SLACK = "itl_slack"
    """Decodes wait for company: their ITL target leaves time, and fewer steps cost less."""
    DECODE_PACING = "decode_pacing"
    """Decodes wait for company because the budget asks for it; their ITL target allows it."""
    PARTIAL_DECODE = "partial_decode"
    """Only some decodes fit: those that have waited longest run."""
    PAUSE = "pause"
    """Nothing fits the budget now."""
    PREFILL_OVERDUE = "prefill_overdue"
    """Decodes wait, so that prompts which have waited too long get their turn."""
    FORCED_OVER_BUDGET = "forced_over_budget"
    """Work ran over the budget, because it had been held back for the longest time allowed."""
    CAP = "cap"
    """The cap of a baseline policy held, static or reactive; no prediction was asked."""
    FALLBACK_CAP = "fallback_cap"
    """The controller failed; fixed caps hold."""
    OFF = "off"
    """Shaping is off, or no limit is configured."""


class Decision(NamedTuple):
    """One step's decision: what was wanted, what was applied, why, and what it should draw."""

    at_seconds: float
    reason: Reason
    limits: StepLimits
    applied: bool
    """False in shadow mode: the limits were decided and then not applied."""
    wanted_prefill_tokens: int
    decode_requests: int
    prefill_tokens: int
    """Tokens of prompts in the step that was launched."""
    predicted: StepPrediction
    headroom_watts: float
    """How far the launched step stays below the watts that fitted; infinity without limits."""
