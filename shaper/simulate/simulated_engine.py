"""One engine's place in a rack: the engine with its own errors, and what is counted of it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np

from shaper.core.ledger.shared import PowerGroup
from shaper.core.model.power_model import StepModel
from shaper.core.types import ClockEventReasons, Decision, StepBatch
from shaper.emulator.silicon import EmulatedGpus
from shaper.gpu.profiles import load_profile
from shaper.simulate import true_gpu
from shaper.simulate.engine import VirtualEngine, VirtualRequest
from shaper.simulate.policies import new_policy
from shaper.simulate.setup import EngineResult, Errors, FloatArray, RackSetup
from shaper.traffic.figures import GRID_SECONDS

# A chunk of usual length; its joules per token stand for those of a prompt.
_CHUNK_TOKENS = 1024
_CHUNK = StepBatch(
    prefill_requests=1,
    prefill_tokens=_CHUNK_TOKENS,
    prefill_context_tokens=_CHUNK_TOKENS,
    prefill_token_context_product=_CHUNK_TOKENS**2,
    prefill_squared_tokens=_CHUNK_TOKENS**2,
)


def drawn_gpu(model: StepModel, errors: Errors, seed: int, index: int) -> true_gpu.TrueGpu:
    """The GPUs of engine `index`, each term off by what is drawn; see `Errors`."""
    shared, own = random.Random(f"model {seed}"), random.Random(f"gpu {seed} {index}")
    ratios = {
        term: (1.0 + errors.model_ratio * shared.uniform(-1.0, 1.0))
        * (1.0 + errors.own_ratio * own.uniform(-1.0, 1.0))
        for term in true_gpu.TERMS
    }
    return true_gpu.terms(model, ratios)


class SimulatedEngine:
    """An engine's place in the rack: the engine, and what is counted of it."""

    def __init__(self, setup: RackSetup, index: int, config: Any, group: PowerGroup | None) -> None:
        from shaper.emulator.kv_cache import true_model
        from shaper.simulate.build import new_engine

        profile = load_profile(setup.gpu)
        model = true_model(config, profile)
        errors, seed = setup.errors, setup.seed
        true = (
            drawn_gpu(model, errors, seed, index)
            if setup.plant is None
            else setup.plant(model, index)
        )
        late = random.Random(f"host {seed} {index}")
        self.reasons: Counter[str] = Counter()
        self.kv_sum = self.kv_peak = 0.0
        self.preemptions = 0
        meter_seed = seed * 1000 + index
        self.engine: VirtualEngine = new_engine(
            config,
            setup.gpu,
            setup.limits if setup.shaped else None,
            policy=lambda: new_policy(setup),
            kv_blocks=None,
            itl_target_seconds=setup.itl_target_seconds,
            ttft_target_seconds=setup.ttft_target_seconds,
            spend_slack=setup.objective == "efficiency",
            max_pause_seconds=setup.max_pause_seconds,
            margin_ratio=setup.margin_ratio,
            log=self,
            on_output=self._on_output,
            host_late_seconds=lambda: (
                late.expovariate(1.0 / errors.host_late_seconds)
                if errors.host_late_seconds
                else 0.0
            ),
            plant=true,
            exact_meter=errors.exact_meter,
            meter_seed=meter_seed,
            step_noise_ratio=errors.step_noise_ratio,
            group=group,
        )
        gpus = self.engine.gpus
        self.metered_ratio = (
            1.0
            if errors.exact_meter
            else true_gpu.metered_ratio(gpus.profile, gpus.gpu_count, meter_seed)
        )
        _set_gpus(gpus, setup)
        self._joules_per_token = model.predict(_CHUNK).joules / _CHUNK_TOKENS
        self._share_watts = min(
            [
                *(limit.watts for limit in setup.limits),
                *(limit.watts / setup.engines for limit in setup.group_limits),
                profile.power.limit_watts * model.gpu_count,
            ]
        )

    def _on_output(self, output: Any) -> None:
        used = float(self.engine.scheduler.kv_cache_manager.usage)
        self.kv_sum += used
        self.kv_peak = max(self.kv_peak, used)
        self.preemptions += len(output.preempted_req_ids or ())

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        """Counts a decision."""
        self.reasons[decision.reason.value] += 1

    @property
    def unfinished_requests(self) -> int:
        """See `router.RoutedEngine`."""
        return len(self.engine.scheduler.requests) + len(self.engine.inbox)

    def headroom_watts(self, now_seconds: float) -> float:
        """See `router.RoutedEngine`."""
        drawn = sum(x.average_watts or 0.0 for x in self.engine.gpus.sample(now_seconds))
        waiting = itertools.chain(self.engine.scheduler.requests.values(), self.engine.inbox)
        tokens: int = sum(max(0, x.num_prompt_tokens - x.num_computed_tokens) for x in waiting)
        return self._share_watts - drawn - tokens * self._joules_per_token / 1.0

    def result(self, prompts: dict[str, int], milliseconds: int) -> EngineResult:
        """What it did in the first so many milliseconds."""
        engine = self.engine
        records = list(engine.requests.values())
        shaper = getattr(engine.scheduler, "shaper", None)
        return EngineResult(
            watts=_grid(engine.gpus, milliseconds),
            metered_ratio=self.metered_ratio,
            arrival_seconds=np.array([r.arrival_seconds for r in records]),
            prompt_tokens=np.array([prompts[name] for name in engine.requests], dtype=np.int64),
            output_tokens=np.array([len(r.token_seconds) for r in records], dtype=np.int64),
            first_token_seconds=np.array([_first(r) for r in records]),
            last_token_seconds=np.array(
                [np.nan if r.finished_seconds is None else r.finished_seconds for r in records]
            ),
            token_seconds=np.array([at for r in records for at in r.token_seconds]),
            steps=engine.steps,
            kv_mean_ratio=self.kv_sum / max(1, engine.steps),
            kv_peak_ratio=self.kv_peak,
            preemptions=self.preemptions,
            reasons=tuple(self.reasons.most_common()),
            shaper_errors=0 if shaper is None else shaper.counters.errors,
        )


def _first(record: VirtualRequest) -> float:
    return record.token_seconds[0] if record.token_seconds else float("nan")


def _set_gpus(gpus: EmulatedGpus, setup: RackSetup) -> None:
    if setup.gpu_power_cap_watts is not None:
        gpus.set_power_cap(setup.gpu_power_cap_watts)
    if setup.gpu_clock_hertz is not None:
        gpus.set_clock_ceiling(setup.gpu_clock_hertz, ClockEventReasons.APPLICATIONS_CLOCKS_SETTING)


def _grid(gpus: EmulatedGpus, milliseconds: int) -> FloatArray:
    """[milliseconds] true mean power from time 0 on."""
    gpus.advance(max(milliseconds * GRID_SECONDS, gpus.free_at_seconds))
    rows = gpus.take_segments()
    joules = np.concatenate(([0.0], np.cumsum((rows[:, 1] - rows[:, 0]) * rows[:, 2])))
    times = np.concatenate((rows[:1, 0], rows[:, 1]))
    edges = np.arange(milliseconds + 1) * GRID_SECONDS
    return np.asarray(np.diff(np.interp(edges, times, joules)) / GRID_SECONDS, dtype=np.float64)
