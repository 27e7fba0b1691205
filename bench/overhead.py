"""What the shaper costs: microseconds it adds to `schedule()` plus `update_from_output()`.

    python -m bench.overhead [--quick] [--sizes 1,64,256,1024] [--steps 300] [--json FILE]
    python -m bench.overhead --memory [--steps 1000000]

Each size is run in four states of the shaper: no limit, limits that don't bind, a limit that
binds (prompts wait, so that the planner looks for a chunk at every step), and the same while 64
prompts of 30,000 tokens that are in the prefix cache wait, and no step takes one. All is
virtual time in this process; what is timed is the CPU time of this thread, so that
other work on the machine costs precision only.

`adds` is what the aim is judged by: inside one engine, both calls, less the part of vLLM's
own methods in the same calls; median, p10 and p99 over steps with tokens. `beside a twin` is
the other view: the whole calls, less those of an unshaped engine that takes steps by turns
with it. It also has what the limits make vLLM do (copy token ids after a pause), and the
noise of two schedulers in different memory: `twins` says how far two unshaped ones differ.
`poll` is a call that schedules nothing, while work is held back: about one a millisecond.

`--memory` is another question, and needs no vLLM: see `bench.harness.memory`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness.memory import show
from bench.harness.options import one_line
from bench.harness.timers import PARTS, Parts, Timed, own_methods_timed, timer_microseconds
from shaper.cli.arguments import Parser
from shaper.core.policy import Plan, PlanInput
from shaper.core.policy.windowed import WindowedPlanner
from shaper.core.types import PowerLimit, Reason, StepLimits
from shaper.engine.preflight import check_vllm_imports
from shaper.errors import ConfigError
from shaper.files.outputs import check_output

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
STATES: dict[str, tuple[PowerLimit, ...]] = {
    "no limit": (),
    "loose limits": (PowerLimit(5000.0, 0.1), PowerLimit(4000.0, 1.0)),
    "binding limit": (PowerLimit(640.0, 0.1), PowerLimit(600.0, 1.0)),
    "long queue": (PowerLimit(640.0, 0.1), PowerLimit(600.0, 1.0)),
}
_QUEUE, _QUEUED_PROMPTS, _QUEUED_TOKENS = "long queue", 64, 30_000
# The aim: at most so many microseconds, or this part of vLLM's own, whichever is larger.
AIM_MICROSECONDS, AIM_RATIO = 60.0, 0.03
_WARM_UP_STEPS = 30
_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians over the steps of one size and state."""

    running: int
    state: str
    own_microseconds: float
    added_microseconds: float
    added_p10_microseconds: float
    """On a busy machine: what is left when others have not just emptied the caches."""
    added_p99_microseconds: float
    parts_microseconds: dict[str, float]
    """Of `PARTS`, from steps of their own, since each timer costs something, too."""
    twin_microseconds: float
    """More than the unshaped engine beside it."""
    noise_microseconds: float
    """By how much two unshaped ones differ."""
    polls_per_step: float
    poll_microseconds: float | None

    @property
    def within_aim(self) -> bool:
        """Whether the aim is met."""
        return self.added_microseconds <= max(AIM_MICROSECONDS, AIM_RATIO * self.own_microseconds)


class _Published:
    """A sampler that ticks between the timed calls, as the live one does in its thread."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.latest = sampler.latest

    def tick(self) -> None:
        """Publish what there is by now."""
        self.latest = self._sampler.latest


class _Holding(WindowedPlanner):
    """Decides as the planner does, and lets no prompt in once it `holds`."""

    holds = False

    def plan(self, view: PlanInput) -> Plan:
        """See the class."""
        plan = super().plan(view)
        return Plan(StepLimits(prefill_tokens=0), Reason.DECODE_ONLY) if self.holds else plan


def _engine(
    config: Any,
    running: int,
    limits: tuple[PowerLimit, ...] | None,
    steps: int,
    queue: bool = False,
) -> Any:
    from shaper.simulate.build import new_engine
    from shaper.simulate.engine import new_request

    policy = _Holding()
    # Nothing is forced within the run.
    engine = new_engine(
        config, GPU, limits, kv_blocks=200_000, policy=lambda: policy,
        max_pause_seconds=1e6 if queue else 1.0,
    )  # fmt: skip
    if limits is not None:
        shaper = engine.scheduler.shaper
        shaper._sampler = _Published(shaper._sampler)
    tokens = _WARM_UP_STEPS + 3 * len(STATES) * steps + 200
    for index in range(running):
        prompt = [(index * 7 + position) % 256 for position in range(_PROMPT_TOKENS)]
        engine.add(new_request(f"r{index}", prompt, tokens, config))
    _run(engine, _WARM_UP_STEPS + -(-running * _PROMPT_TOKENS // 512))
    if queue:
        prompt = [(position * position) % 251 for position in range(_QUEUED_TOKENS)]
        engine.add(new_request("first", prompt, 1, config))
        while engine.requests["first"].finished_seconds is None:
            _run(engine, 1)
        policy.holds = True
        for index in range(_QUEUED_PROMPTS):
            engine.add(new_request(f"queued{index}", prompt, 1, config))
        return engine
    # A prompt longer than any run: what waits while a limit binds.
    engine.add(new_request("long", list(range(256)) * 400, 1, config))
    return engine


def _run(engine: Any, steps: int) -> None:
    done = engine.steps + steps
    shaper = getattr(engine.scheduler, "shaper", None)
    while engine.steps < done:
        if shaper is not None:
            shaper._sampler.tick()
        engine.step()


def measure(running: int, steps: int) -> Iterator[Cost]:
    """Costs at `running` decodes, from `steps` steps of each state, as they are known."""
    from shaper.simulate.engine import engine_config

    config = engine_config(MODEL, GPU)
    unshaped = [_engine(config, running, None, steps) for _ in range(2)]
    for name, limits in STATES.items():
        engine = _engine(config, running, limits, steps, name == _QUEUE)
        gc.collect()
        gc.disable()  # a collection in the middle would be counted as the shaper's
        try:
            timed = Timed(engine.scheduler)
            with own_methods_timed({id(engine.scheduler): timed}):
                _run(engine, steps)
            timed.remove()
            parts = Parts(engine.scheduler.shaper)
            _run(engine, steps)
            parts.remove()
            beside = _by_turns([engine, *unshaped], steps)
        finally:
            gc.enable()
        yield _cost(running, name, timed, parts.medians(), beside)


def _by_turns(engines: Sequence[Any], steps: int) -> list[list[float]]:
    """Microseconds of the engines' calls, step by step beside each other."""
    timed = [Timed(engine.scheduler) for engine in engines]
    for _ in range(steps):
        for engine in engines:
            _run(engine, 1)
    for each in timed:
        each.remove()
    return [each.whole() for each in timed]


def _cost(
    running: int,
    name: str,
    timed: Timed,
    parts: dict[str, float],
    beside: Sequence[Sequence[float]],
) -> Cost:
    whole, own = timed.whole(), timed.own()
    # Two calls a step, each with a timer inside a timer.
    timers = 2 * timer_microseconds()
    added = sorted(a - b - timers for a, b in zip(whole, own, strict=True))
    shaped, unshaped, twin = beside
    return Cost(
        running=running,
        state=name,
        own_microseconds=statistics.median(own),
        added_microseconds=statistics.median(added),
        added_p10_microseconds=added[int(0.1 * len(added))],
        added_p99_microseconds=added[int(0.99 * len(added))],
        parts_microseconds=parts,
        twin_microseconds=_difference(shaped, unshaped),
        noise_microseconds=abs(_difference(twin, unshaped)),
        polls_per_step=len(timed.polls) / len(whole),
        poll_microseconds=statistics.median(timed.polls) / 1e3 if timed.polls else None,
    )


def _difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Median of what two engines' steps differ by, in the order in which they were taken."""
    return statistics.median(a - b for a, b in zip(one, other, strict=False))


HEADING = (
    "| running | state | vLLM's own | shaper adds | p10 | p99 | of own | aim "
    "| decide | record | return | beside a twin | twins | polls/step | poll |\n"
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: "
    "| ---: | ---: |"
)


def row(cost: Cost) -> str:
    """A cost as a line of Markdown below `HEADING`; all in microseconds."""
    share = cost.added_microseconds / cost.own_microseconds
    poll = "-" if cost.poll_microseconds is None else f"{cost.poll_microseconds:,.0f}"
    parts = " | ".join(f"{cost.parts_microseconds[part]:,.0f}" for part in PARTS)
    return (
        f"| {cost.running} | {cost.state} | {cost.own_microseconds:,.0f} "
        f"| {cost.added_microseconds:,.0f} | {cost.added_p10_microseconds:,.0f} "
        f"| {cost.added_p99_microseconds:,.0f} "
        f"| {share:.1%} | {'met' if cost.within_aim else 'missed'} | {parts} "
        f"| {cost.twin_microseconds:,.0f} | ±{cost.noise_microseconds:,.0f} "
        f"| {cost.polls_per_step:.1f} | {poll} |"
    )


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes {text!r}: give numbers of requests, like 1,64,256") from error
    if not all(0 < size <= 1024 for size in sizes):
        raise ConfigError(f"--sizes {text!r}: each size must be within 1 to 1024")
    return sizes


def _steps(given: int | None, usual: int, most: int) -> int:
    steps = usual if given is None else given
    if not 1 <= steps <= most:
        raise ConfigError(f"--steps {steps}: give 1 to {most}")
    return steps


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0, or 2 for wrong input."""
    return one_line("bench.overhead", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--sizes", help="running requests (default 1,64,256,1024)")
    parser.add_argument("--steps", type=int, help="steps per state and size, or of --memory")
    parser.add_argument("--quick", action="store_true", help="1 and 64 requests, 60 steps")
    parser.add_argument("--memory", action="store_true", help="memory over many steps instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the costs here, too")
    options = parser.parse_args(argv)
    check_output(options.json, "--json")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to stdout
    sizes = _sizes(options.sizes or ("1,64" if options.quick else "1,64,256,1024"))
    steps = (
        _steps(options.steps, 1_000_000, 10_000_000)
        if options.memory
        else _steps(options.steps, 60 if options.quick else 300, 5000)
    )
    check_vllm_imports()
    if options.memory:
        show(steps)
        return 0
    print(HEADING)
    costs = []
    for size in sizes:
        for cost in measure(size, steps):
            costs.append(cost)
            print(row(cost), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
