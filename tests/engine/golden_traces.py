"""Scripted runs whose decisions are kept in `golden/`, and the command that writes them anew.

    python -m tests.engine.golden_traces [NAME ...]

A trace is CSV: decisions in order, equal neighbours as one line with their count. A
refactor reproduces every line. A change of behaviour writes them anew, and the reason
belongs in the changelog.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

# vLLM chooses its platform at import, once per process.
os.environ["SHAPER_EMULATE"] = "h200-sxm"
os.environ["HF_HUB_OFFLINE"] = "1"

from shaper.core.types import Decision, PowerBudget, PowerLimit

FOLDER = Path(__file__).with_name("golden")
HEADING = "count,reason,decodes,prefill_tokens,watts"

Traffic = list[tuple[float, list[int], int]]


@dataclass(frozen=True)
class Script:
    """One run: an engine, its traffic, and what happens at which time."""

    limits: tuple[PowerLimit, ...]
    traffic: Callable[[], Traffic]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    events: tuple[tuple[float, Callable[[Any], None]], ...] = ()
    """Times, and calls with the `harness.Attacked` engine."""


def mixed(seed: int, rate: float, seconds: float) -> Traffic:
    """Arrivals at random, of short and long prompts."""
    rng = random.Random(seed)
    traffic, now = [], 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        length = min(6000, max(8, int(rng.lognormvariate(6.5, 1.0))))
        traffic.append((now, [rng.randrange(256) for _ in range(length)], rng.randint(10, 120)))
    return traffic


def bursts() -> Traffic:
    """A few decodes, and twice five long prompts at once."""
    rng = random.Random(2)

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(256) for _ in range(tokens)]

    calm = [(0.01 * i, prompt(100), 250) for i in range(4)]
    return calm + [(at, prompt(2500), 20) for at in (0.4, 1.2) for _ in range(5)]


def _budget(watts: float, window: float = 0.1) -> Callable[[Any], None]:
    return lambda rig: rig.shaper.set_budget(PowerBudget((PowerLimit(watts, window),)))


def _fault(name: str | None) -> Callable[[Any], None]:
    return lambda rig: setattr(rig.reader, "fault", name)


SCRIPTS: dict[str, Script] = {
    "budget_step": Script(
        (PowerLimit(620.0, 0.1),),
        lambda: mixed(1, 12.0, 2.0),
        2.0,
        events=((0.6, _budget(450.0)), (1.3, _budget(620.0))),
    ),
    "bursts": Script((PowerLimit(540.0, 0.1),), bursts, 2.2),
    "sensor_lost_and_back": Script(
        (PowerLimit(480.0, 0.1),),
        lambda: mixed(3, 3.0, 2.4),
        2.4,
        # A reading of a second ago is stale.
        events=((0.4, _fault("lost")), (1.8, _fault(None))),
    ),
    "sensor_lies": Script(
        (PowerLimit(500.0, 0.1),),
        lambda: mixed(10, 9.0, 1.6),
        1.6,
        events=((0.4, _fault("x1000")), (0.9, _fault("nan")), (1.3, _fault(None))),
    ),
    "several_windows": Script(
        (PowerLimit(640.0, 0.05), PowerLimit(470.0, 1.0)), lambda: mixed(5, 9.0, 1.4), 1.5
    ),
    "latency_targets": Script(
        (PowerLimit(500.0, 0.1),),
        lambda: mixed(6, 10.0, 1.2),
        1.3,
        {"itl_target_seconds": 0.03, "ttft_target_seconds": 0.3},
    ),
    "efficiency": Script(
        (),
        lambda: mixed(7, 5.0, 1.0),
        1.2,
        {"itl_target_seconds": 0.05, "spend_slack": True},
    ),
    "below_the_decodes": Script((PowerLimit(330.0, 0.1),), lambda: mixed(8, 3.0, 2.5), 3.0),
    "ramp": Script((), bursts, 1.6, {"ramp_watts_per_second": 400.0}),
    "synchronous": Script(
        (PowerLimit(520.0, 0.1),), lambda: mixed(9, 8.0, 1.5), 1.5, {"asynchronous": False}
    ),
}


def decide(name: str) -> list[Decision]:
    """Run a script; its decisions."""
    from tests.engine.harness import attacked

    script = SCRIPTS[name]
    rig = attacked(script.limits, **script.settings)
    arrivals = [
        (at, lambda rig, i=i, prompt=prompt, tokens=tokens: rig.add(f"r{i}", prompt, tokens))
        for i, (at, prompt, tokens) in enumerate(script.traffic())
    ]
    for at, call in sorted([*arrivals, *script.events], key=lambda event: event[0]):
        rig.engine.run_until(at)
        call(rig)
    rig.engine.run_until(script.seconds)
    return rig.log.decisions


def trace(decisions: Sequence[Decision]) -> str:
    """Decisions as lines of `HEADING`."""
    rows = (
        f"{d.reason},{d.decode_requests},{d.prefill_tokens},{d.predicted.watts:.0f}"
        for d in decisions
    )
    lines = [f"{len(list(same))},{row}" for row, same in groupby(rows)]
    return "\n".join([HEADING, *lines, ""])


def main(names: Sequence[str]) -> int:
    """Write the traces of these scripts, or of all."""
    for name in names or SCRIPTS:
        path = FOLDER / f"{name}.csv"
        before = path.read_text() if path.exists() else ""
        text = trace(decide(name))
        path.write_text(text)
        state = "unchanged" if text == before else "CHANGED" if before else "new"
        print(f"{path.name}: {len(text.splitlines()) - 1} lines, {state}")
    total = sum(path.stat().st_size for path in FOLDER.glob("*.csv"))
    print(f"{total} bytes in all. What changed, changed on purpose: write why in CHANGELOG.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
