"""What a rack in virtual time is built from, and what came of it: frozen, picklable values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shaper.core.model.power_model import StepModel
from shaper.core.types import PowerLimit
from shaper.simulate.true_gpu import TrueGpu

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NewPlant = Callable[[StepModel, int], TrueGpu]
"""Makes what engine k's GPUs truly do from what its controller believes. To cross to another
process it is a function of a module, or a `functools.partial` of one."""


@dataclass(frozen=True, slots=True)
class Errors:
    """What the controller does not know about the GPUs, the meters and the host.

    The ratios of a model error are drawn uniformly within plus or minus the number, by seed,
    for each of `true_gpu.TERMS`: first one that all engines share (the profile is wrong),
    then one of each engine's own (no two GPUs are alike).
    """

    model_ratio: float = 0.05
    """About the mean error of the profiles on published serving power (`bench.fidelity`)."""
    own_ratio: float = 0.02
    """An estimate: GPUs of one kind differ by a few percent at the same clock."""
    exact_meter: bool = False
    """Leave out the meters' gain error; their windows and refresh stay."""
    step_noise_ratio: float = 0.01
    """Standard deviation of a step's relative duration, for the clock's small moves; an
    estimate."""
    host_late_seconds: float = 0.0001
    """Mean of the exponential delay with which the host sees a step's end; an estimate."""


NO_ERRORS = Errors(0.0, 0.0, True, 0.0, 0.0)
"""A controller that knows everything."""


@dataclass(frozen=True, slots=True)
class RackSetup:
    """A rack: its GPUs, its engines, what shapes them, and what they don't know."""

    gpu: str = "h200-sxm"
    """Name of a profile, or the path of one."""
    model: str = "llama-3.1-8b"
    """Built-in shape, or a directory with a Hugging Face config."""
    tensor_parallel: int = 1
    """GPUs of each engine."""
    engines: int = 8
    duration_seconds: float = 120.0
    warm_up_seconds: float = 0.0
    """Of the start, which latency, throughput and cost leave out. Limits and peaks don't."""
    rate_scale: float = 1.0
    router: str = "split"
    seed: int = 0
    """Of the segments' shift, the prompts' text, and all errors."""

    shaped: bool = True
    """False: vLLM's own scheduler, with no shaper in the process."""
    policy: str = "predictive"
    prefill_tokens_cap: int | None = None
    running_requests_cap: int | None = None
    """These two are for the policy `static`."""
    limits: tuple[PowerLimit, ...] = ()
    """Of each engine, summed over its GPUs."""
    group_limits: tuple[PowerLimit, ...] = ()
    """Of all engines together, kept by a shared ledger where the rack is shaped and `shared`."""
    shared: bool = True
    """False: the group's limits are only judged; nothing keeps them but `limits`."""
    itl_target_seconds: float | None = None
    ttft_target_seconds: float | None = None
    objective: Literal["latency", "efficiency"] = "latency"
    margin_ratio: float = 0.01
    max_pause_seconds: float = 1.0

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    gpu_power_cap_watts: float | None = None
    """Of each GPU, held by the emulated driver. None: the GPU's default."""
    gpu_clock_hertz: float | None = None
    """Highest SM clock of each GPU. None: the GPU's own."""
    errors: Errors = Errors()
    plant: NewPlant | None = None
    """In place of the drawn model error. None: drawn."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What one engine did.

    `watts` [n] is its true mean power of each millisecond from 0 on, all its GPUs;
    `token_seconds` [t] when each token was made, request by request. The other arrays [r] are
    by request in the order of arrival; NaN where there was no token or no end in time.
    """

    watts: FloatArray
    metered_ratio: float
    """What its meters show over its true watts."""
    arrival_seconds: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    """Those that were made in time."""
    first_token_seconds: FloatArray
    last_token_seconds: FloatArray
    """Of finished requests."""
    token_seconds: FloatArray
    steps: int
    kv_mean_ratio: float
    """Used share of the KV cache, over the steps."""
    kv_peak_ratio: float
    preemptions: int
    reasons: tuple[tuple[str, int], ...]
    """Decisions by reason, the most frequent first."""
    shaper_errors: int
    """Times that the shaper failed and vLLM went on under the fallback cap."""

    def gaps(self, from_seconds: float = 0.0) -> FloatArray:
        """Seconds between two tokens of one request, the later one made since `from_seconds`."""
        firsts = np.zeros(len(self.token_seconds) + 1, dtype=bool)
        firsts[np.concatenate(([0], np.cumsum(self.output_tokens)))] = True
        later = ~firsts[1:-1] & (self.token_seconds[1:] >= from_seconds)
        return np.asarray(np.diff(self.token_seconds)[later], dtype=np.float64)

    @property
    def itl_seconds(self) -> FloatArray:
        """All of them."""
        return self.gaps()


@dataclass(frozen=True, slots=True)
class RackResult:
    """What came of a run."""

    setup: RackSetup
    workload: str
    engines: tuple[EngineResult, ...]
    too_long_requests: int
    """Arrivals that don't fit the model's context or the KV cache; they were not sent."""
    wall_seconds: float
    """What it took on this machine, without the imports and vLLM's configuration."""

    @property
    def watts(self) -> FloatArray:
        """[n] true power of the group by millisecond."""
        return np.asarray(sum(engine.watts for engine in self.engines), dtype=np.float64)

    @property
    def metered_watts(self) -> FloatArray:
        """[n] the same as the engines' meters would sum it up, if they were as quick."""
        total = sum(engine.watts * engine.metered_ratio for engine in self.engines)
        return np.asarray(total, dtype=np.float64)

    @property
    def engine_seconds_per_second(self) -> float:
        """Simulated engine-seconds for each second of this machine."""
        seconds = len(self.engines) * self.setup.duration_seconds
        return seconds / self.wall_seconds if self.wall_seconds > 0 else float("inf")
