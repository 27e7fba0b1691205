"""What the shaper costs: microseconds it adds to `schedule()` plus `update_from_output()`.

    python -m bench.overhead [--sizes 1,64,256,1024] [--steps 300] [--json FILE]

vLLM's own scheduler and shaped ones step the same decodes in virtual time, by turns, in
this process; each call is timed alone, and the medians are compared. Three states of the
shaper: no limit, limits that don't bind, and a limit that binds (prompts wait, so that
the planner tries its ladder of chunk sizes at every step).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shaper.core.types import PowerLimit
from shaper.errors import ConfigError, ShaperError

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
STATES: dict[str, tuple[PowerLimit, ...] | None] = {
    "vLLM": None,
    "no limit": (),
    "loose limits": (PowerLimit(5000.0, 0.1), PowerLimit(4000.0, 1.0)),
    "binding limit": (PowerLimit(640.0, 0.1), PowerLimit(600.0, 1.0)),
}
# The aim: at most so many microseconds, or this part of vLLM's own, whichever is larger.
AIM_MICROSECONDS, AIM_RATIO = 60.0, 0.03
_WARM_UP_STEPS = 30
_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians over the steps of one size."""

    running: int
    state: str
    own_microseconds: float
    added_microseconds: float

    @property
    def within_aim(self) -> bool:
        """Whether the aim is met."""
        return self.added_microseconds <= max(AIM_MICROSECONDS, AIM_RATIO * self.own_microseconds)


class _Timed:
    """Times two methods of a scheduler from outside, the shaper's part included.

    Calls for steps without tokens are left out: the polls of a pause delay nobody.
    """

    def __init__(self, scheduler: Any) -> None:
        self._seconds: dict[str, list[float]] = {"schedule": [], "update_from_output": []}
        for name in self._seconds:
            setattr(scheduler, name, self._timed(name, getattr(scheduler, name)))

    def _timed(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            returned = method(*args, **kwargs)
            seconds = time.perf_counter() - start
            step = returned if name == "schedule" else args[0]
            if step.total_num_scheduled_tokens:
                self._seconds[name].append(seconds)
            return returned

        return call

    def reset(self) -> None:
        """Forget the warm-up."""
        for seconds in self._seconds.values():
            seconds.clear()

    @property
    def microseconds(self) -> float:
        """The medians of both methods, added up."""
        return 1e6 * sum(statistics.median(seconds) for seconds in self._seconds.values())


def _engine(config: Any, running: int, limits: tuple[PowerLimit, ...] | None, steps: int) -> Any:
    from shaper.simulate.engine import new_request
    from shaper.simulate.rig import new_engine

    engine = new_engine(config, GPU, limits, kv_blocks=200_000)
    tokens = _WARM_UP_STEPS + steps + 200
    for index in range(running):
        prompt = [(index * 7 + position) % 256 for position in range(_PROMPT_TOKENS)]
        engine.add(new_request(f"r{index}", prompt, tokens, config))
    timed = _Timed(engine.scheduler)
    done = engine.steps + _WARM_UP_STEPS + -(-running * _PROMPT_TOKENS // 512)
    while engine.steps < done:
        engine.step()
    # A prompt longer than any run: what waits while a limit binds.
    engine.add(new_request("long", list(range(256)) * 400, 1, config))
    return engine, timed


def measure(running: int, steps: int) -> list[Cost]:
    """Costs at `running` decodes, from `steps` steps of each state by turns."""
    from shaper.simulate.engine import engine_config

    config = engine_config(MODEL, GPU)
    engines = {name: _engine(config, running, limits, steps) for name, limits in STATES.items()}
    for _, timed in engines.values():
        timed.reset()
    gc.collect()
    gc.disable()  # a collection in the middle would be counted as one state's
    try:
        for _ in range(steps):
            for engine, _ in engines.values():
                before = engine.steps
                while engine.steps == before:
                    engine.step()
    finally:
        gc.enable()
    medians = {name: timed.microseconds for name, (_, timed) in engines.items()}
    own = medians["vLLM"]
    return [Cost(running, name, own, medians[name] - own) for name in STATES if name != "vLLM"]


def table(costs: Sequence[Cost]) -> str:
    """The costs as Markdown."""
    lines = [
        "| running | state | vLLM's own, us | shaper adds, us | of vLLM's own | aim |",
        "| ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for cost in costs:
        share = cost.added_microseconds / cost.own_microseconds
        verdict = "met" if cost.within_aim else "missed"
        lines.append(
            f"| {cost.running} | {cost.state} | {cost.own_microseconds:,.0f} "
            f"| {cost.added_microseconds:,.0f} | {share:.1%} | {verdict} |"
        )
    return "\n".join(lines)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes {text!r}: give numbers of requests, like 1,64,256") from error
    if not all(0 < size <= 1024 for size in sizes):
        raise ConfigError(f"--sizes {text!r}: each size must be within 1 to 1024")
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--sizes", default="1,64,256,1024", help="running requests")
    parser.add_argument("--steps", type=int, default=300, help="steps per state and size")
    parser.add_argument("--json", metavar="FILE", help="write the costs here, too")
    options = parser.parse_args(argv)
    try:
        sizes = _sizes(options.sizes)
        if not 1 <= options.steps <= 5000:
            raise ConfigError(f"--steps {options.steps}: give 1 to 5000")
        costs = [cost for size in sizes for cost in measure(size, options.steps)]
    except ShaperError as error:
        print(f"bench.overhead: error: {error}", file=sys.stderr)
        return 2
    print(table(costs))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(cost) for cost in costs], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
