"""GPUs that the estimator's model can't represent: `python -m bench.studies.learning`.

Each row is one plant (`shaper.simulate.true_gpu`) under one budget: vLLM's real scheduler and
the shaper in virtual time, a meter with its own gain error whose energy counter moves each
100 ms, random traffic. The limit is a share of the same plant's unshaped peak; power is
judged in metered watts, over every window that begins after the first seconds.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.harness.options import one_line, seconds
from shaper.cli.arguments import Parser
from shaper.core.types import PowerLimit, StepBatch, StepPrediction

FloatArray = npt.NDArray[np.float64]
Traffic = list[tuple[float, list[int], int]]

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
SEEN_SECONDS = 10.0
ERROR_RATIO = 0.15
# The default of the configuration.
MARGIN_RATIO = 0.01
_GRID_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Outcome:
    """One plant under one limit, after the first seconds; metered watts."""

    limit: PowerLimit
    over_ratio: float
    """Share of the sliding windows that are over the limit."""
    excess_ratio: float
    """How far the worst of them is over it."""
    used_ratio: float
    """Mean power over the limit, while requests were there."""
    seconds_error_before: float
    """Mean absolute error of step seconds, as the model says."""
    seconds_error_after: float
    joules_error_before: float
    """The same of step joules, against what the meter would show of each."""
    joules_error_after: float
    disagreed: int
    """Steps at whose end the estimator disagreed with the meter."""
    forced: int
    finished: bool


def random_traffic(seed: int, seconds: float, rate: float = 8.0) -> Traffic:
    """Bursts of long and short prompts until `seconds`: arrival, prompt, output tokens."""
    rng = random.Random(seed)
    traffic: Traffic = []
    now = 0.0
    while True:
        now += rng.expovariate(rate) if rng.random() > 0.3 else 0.0
        if now > seconds:
            return traffic
        length = min(12_000, max(1, int(rng.lognormvariate(6.3, 1.1))))
        traffic.append((now, [rng.randrange(256) for _ in range(length)], rng.randint(1, 200)))


def metered_windows(segments: FloatArray, window_seconds: float, gain: float) -> FloatArray:
    """Shape (N, 2): end and metered mean watts of every window, each millisecond."""
    edges = np.concatenate((segments[:1, 0], segments[:, 1]))
    joules = np.concatenate(([0.0], np.cumsum((segments[:, 1] - segments[:, 0]) * segments[:, 2])))
    ends = np.arange(edges[0] + window_seconds, edges[-1], _GRID_SECONDS)
    spent = np.interp(ends, edges, joules) - np.interp(ends - window_seconds, edges, joules)
    return np.column_stack((ends, spent * gain / window_seconds))


@cache
def _config() -> Any:
    from shaper.simulate.engine import engine_config

    return engine_config(MODEL, GPU)


@cache
def model() -> Any:
    """What the controller believes."""
    from shaper.core.model.power_model import StepModel
    from shaper.engine.work import engine_coefficients
    from shaper.gpu.profiles import load_profile

    return StepModel(load_profile(GPU), engine_coefficients(_config()))


def _scaled(ratios: Mapping[str, float]) -> Any:
    from shaper.simulate import true_gpu

    return true_gpu.scaled(model(), **ratios)


def _terms(ratios: Mapping[str, float]) -> Any:
    from shaper.simulate import true_gpu

    return true_gpu.terms(model(), ratios)


def plants() -> dict[str, Callable[[], Any]]:
    """Every kind of plant by name; the models must be built when they are used."""
    from shaper.simulate import true_gpu

    up, down = 1.0 + ERROR_RATIO, 1.0 - ERROR_RATIO
    named: dict[str, Callable[[], Any]] = {"as modelled": lambda: true_gpu.scaled(model())}
    for name, ratio in (("+", up), ("-", down)):
        for what, ratios in (
            ("joules", {"joules_ratio": ratio}),
            ("seconds", {"seconds_ratio": ratio}),
            ("both", {"joules_ratio": ratio, "seconds_ratio": ratio}),
        ):
            named[f"{what} {name}15%"] = partial(_scaled, ratios)
    named["cliff above 512 tokens"] = lambda: true_gpu.cliff(model(), 512)
    named["cliff above 1500 tokens"] = lambda: true_gpu.cliff(model(), 1500)
    named["ceiling at 560 W"] = lambda: true_gpu.ceiling(model(), 560.0)
    named["steeper above 450 W"] = lambda: true_gpu.steeper(model(), 450.0)
    named["drifting"] = lambda: true_gpu.Drifting(model())
    return named


def term_plants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each combination of signs of each term's error."""
    from shaper.simulate import true_gpu

    for signs in itertools.product((1, -1), repeat=len(true_gpu.TERMS)):
        name = "".join("+" if sign > 0 else "-" for sign in signs)
        ratios = {
            term: 1.0 + sign * ERROR_RATIO for term, sign in zip(true_gpu.TERMS, signs, strict=True)
        }
        yield f"terms {name}", partial(_terms, ratios)


class _Watched:
    """Mean absolute errors of step predictions over the steps after `SEEN_SECONDS`."""

    def __init__(self, shaper: Any, gpus: Any, gain: float) -> None:
        self._shaper, self._gain = shaper, gain
        self._launch = gpus.launch
        gpus.launch = self._launched
        self.errors: list[tuple[float, float, float, float]] = []
        self.disagreed = 0

    def _launched(self, batch: StepBatch, now_seconds: float) -> Any:
        run = self._launch(batch, now_seconds)
        controller = self._shaper._controller if self._shaper else None
        if controller is None or now_seconds < SEEN_SECONDS:
            return run
        flight = controller._in_flight_steps._queue[-1]
        self.disagreed += controller.estimator.disagrees
        joules = run.joules * self._gain

        def errors(of: StepPrediction) -> tuple[float, float]:
            return abs(of.seconds / run.seconds - 1.0), abs(of.joules / joules - 1.0)

        self.errors.append((*errors(flight.raw), *errors(flight.prediction)))
        return run


def serve(
    plant: Any, limits: tuple[PowerLimit, ...] | None, traffic: Traffic, meter_seed: int = 1
) -> tuple[Any, _Watched, float]:
    """Run the traffic on a plant; the engine, what was watched, and the meter's gain."""
    from shaper.simulate.build import new_engine
    from shaper.simulate.engine import new_request
    from shaper.simulate.true_gpu import Drifting, metered_ratio

    gain = metered_ratio(plant.profile, plant.gpu_count, meter_seed)
    engine = new_engine(
        _config(),
        GPU,
        limits,
        plant=plant,
        exact_meter=False,
        meter_seed=meter_seed,
        margin_ratio=MARGIN_RATIO,
    )
    if isinstance(plant, Drifting):
        plant.clock = lambda: engine.now_seconds
    watched = _Watched(getattr(engine.scheduler, "shaper", None), engine.gpus, gain)
    for index, (arrival, prompt, tokens) in enumerate(traffic):
        engine.run_until(arrival)
        engine.add(new_request(f"r{index}", prompt, tokens, _config()))
    end = traffic[-1][0] + 60.0
    while engine.busy and engine.now_seconds < end:
        engine.step()
    return engine, watched, gain


def unshaped_peak(new_true_gpu: Callable[[], Any], traffic: Traffic, meter_seed: int = 1) -> float:
    """Highest metered 100 ms power of vLLM alone on this plant."""
    engine, _, gain = serve(new_true_gpu(), None, traffic, meter_seed)
    return float(metered_windows(engine.gpus.take_segments(), 0.1, gain)[:, 1].max())


def judge(plant: Any, limit: PowerLimit, traffic: Traffic, meter_seed: int = 1) -> Outcome:
    """Run the shaped engine on a plant and hold it against its limit."""
    engine, watched, gain = serve(plant, (limit,), traffic, meter_seed)
    windows = metered_windows(engine.gpus.take_segments(), limit.window_seconds, gain)
    busy = windows[(windows[:, 0] > SEEN_SECONDS) & (windows[:, 0] < traffic[-1][0])]
    seen = windows[windows[:, 0] > SEEN_SECONDS, 1]
    errors = np.array(watched.errors).reshape(-1, 4).mean(axis=0)
    return Outcome(
        limit,
        over_ratio=float((seen > limit.watts).mean()),
        excess_ratio=max(0.0, float(seen.max()) / limit.watts - 1.0),
        used_ratio=float(busy[:, 1].mean()) / limit.watts,
        seconds_error_before=float(errors[0]),
        seconds_error_after=float(errors[2]),
        joules_error_before=float(errors[1]),
        joules_error_after=float(errors[3]),
        disagreed=watched.disagreed,
        forced=engine.scheduler.shaper.counters.forced,
        finished=all(r.finished_seconds is not None for r in engine.requests.values()),
    )


def _row(name: str, one: Outcome) -> str:
    cells = (
        name,
        f"{one.limit.watts:.0f} W @ {one.limit.window_seconds * 1000:.0f} ms",
        f"{one.over_ratio:.2%}",
        f"{one.excess_ratio:.1%}",
        f"{one.used_ratio:.0%}",
        f"{one.seconds_error_before:.1%} → {one.seconds_error_after:.1%}",
        f"{one.joules_error_before:.1%} → {one.joules_error_after:.1%}",
        f"{one.disagreed}",
        f"{one.forced}",
    )
    return f"| {' | '.join(cells)} |"


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> int:
    """Print the table; 0, or 2 for wrong input."""
    return one_line("bench.studies.learning", _main)


def _main() -> int:
    parser = Parser(prog="python -m bench.studies.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=seconds, default=30.0, help="of traffic (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic (default: 1)")
    parser.add_argument("--terms", type=int, default=8, help="combinations of signs, of 128")
    parser.add_argument("--only", default="", help="plants whose name contains this")
    parser.add_argument("--shares", type=_numbers, default="0.7,0.85", help="of the unshaped peak")
    parser.add_argument("--windows", type=_numbers, default="0.1,1", help="seconds")
    options = parser.parse_args()
    traffic = random_traffic(options.seed, options.seconds)
    chosen = dict(plants())
    every = list(term_plants())
    random.Random(options.seed).shuffle(every)
    chosen |= dict(every[: options.terms])
    print("| plant | limit | over | worst | used | seconds error | joules error | dis | forced |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, new_true_gpu in chosen.items():
        if options.only not in name:
            continue
        peak = unshaped_peak(new_true_gpu, traffic[: len(traffic) // 3])
        for share in options.shares:
            for window in options.windows:
                outcome = judge(new_true_gpu(), PowerLimit(share * peak, window), traffic)
                print(_row(name, outcome), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
