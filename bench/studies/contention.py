"""What sharing costs: microseconds of a query, a reservation and a commit in a power group.

    python -m bench.studies.contention [--engines 1,2,8,32] [--steps 300] [--json FILE]

For each number of engines: so many processes join one group in shared memory, each takes a
step about every 15 ms as a serving engine does, and queries, reserves and commits for it. A
query has a question about a step with it; one plan in two asks none and pays less.

These are in CPU time of their thread, so that other work on the machine costs precision only;
waiting for the lock is in wall time, with all processes on this machine's cores. `static` are
reservations that could not have the lock in 200 us, and were made on the static share;
`refused` those that fitted no longer when they were made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.options import one_line
from shaper.cli.arguments import Parser
from shaper.core.ledger.ledger import Ledger
from shaper.core.ledger.shared import Committed, EngineShare, Step
from shaper.core.types import PowerBudget, PowerLimit, StepPrediction
from shaper.errors import ConfigError, ShaperError
from shaper.files.outputs import check_output
from shaper.group import GroupLedger, join_group
from shaper.group.shared_file import group_directory

IDLE_WATTS, REST_WATTS, REST_AFTER_SECONDS = 140.0, 115.0, 1.0
LIMIT_WATTS_PER_ENGINE = {0.1: 450.0, 1.0: 430.0}
STEP_SECONDS, STEP_WATTS, PERIOD_SECONDS = 0.012, 480.0, 0.015
_WARM_UP_STEPS = 20
_CLOCK = time.thread_time_ns


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one number of engines."""

    engines: int
    windows: int
    query_microseconds: float
    query_p99_microseconds: float
    reserve_microseconds: float
    reserve_p99_microseconds: float
    commit_microseconds: float
    lock_wait_microseconds: float
    """Mean of all reservations, in wall time."""
    lock_wait_max_microseconds: float
    static_ratio: float
    refused_ratio: float


class Engine:
    """Takes steps as a serving engine does, and times what it asks of its group."""

    def __init__(self, group: GroupLedger, seed: int, now_seconds: float) -> None:
        self.group = group
        self.random = random.Random(seed)
        self.ledger = Ledger(
            PowerBudget(),
            IDLE_WATTS,
            now_seconds,
            rest_watts=REST_WATTS,
            rest_after_seconds=REST_AFTER_SECONDS,
        )
        self.nanoseconds: dict[str, list[int]] = {"query": [], "reserve": [], "commit": []}

    def _timed(self, what: str, call: Callable[[], Any]) -> Any:
        start = _CLOCK()
        found = call()
        self.nanoseconds[what].append(_CLOCK() - start)
        return found

    def _committed(self, *runs: tuple[float, float, float]) -> Committed:
        final = self.ledger.end_seconds
        return Committed(final, *self.ledger.corners(final - 0.05, runs))

    def step(self, now_seconds: float) -> tuple[float, float, float] | None:
        """Query and reserve; the run, if there was headroom for it."""
        share = EngineShare(IDLE_WATTS + 40.0, 3.0, 0.008, 60.0, 20.0, margin_ratio=0.02)
        seconds = STEP_SECONDS * self.random.uniform(0.6, 1.3)

        def query() -> float:
            # The rows are read when the first question is asked.
            view = self.group.query(now_seconds, now_seconds, share)
            return min(part.max_watts(seconds) for part in view.parts)

        fits = self._timed("query", query)
        watts = min(STEP_WATTS, fits)
        if watts <= IDLE_WATTS:
            return None
        run = now_seconds, now_seconds + seconds, watts * seconds
        committed = self._committed(run)
        step = Step(now_seconds, StepPrediction(seconds, run[2]))
        claimed = self._timed(
            "reserve", lambda: self.group.reserve(committed, share, now_seconds, step)
        )
        return run if claimed else None

    def finish(self, run: tuple[float, float, float], now_seconds: float) -> None:
        """The step is over."""
        self.ledger.spend(*run)
        committed, share = self._committed(), EngineShare(IDLE_WATTS)
        self._timed("commit", lambda: self.group.commit(committed, share, now_seconds))


def limits_of(engines: int, windows: int) -> tuple[PowerLimit, ...]:
    """So many limits for so many engines."""
    pairs = list(LIMIT_WATTS_PER_ENGINE.items())[:windows]
    return tuple(PowerLimit(watts * engines, window) for window, watts in pairs)


def live(engine: Engine, steps: int) -> None:
    """Steps in real time, each about a period after the last."""
    taken = 0
    while taken < steps + _WARM_UP_STEPS:
        begun = time.monotonic()
        run = engine.step(begun)
        if run is None:
            time.sleep(0.001)
            continue
        taken += 1
        if taken == _WARM_UP_STEPS:
            for samples in engine.nanoseconds.values():
                samples.clear()
        time.sleep(max(0.0, run[1] - time.monotonic()))
        engine.finish(run, time.monotonic())
        pause = PERIOD_SECONDS * engine.random.uniform(0.8, 1.2)
        time.sleep(max(0.0, begun + pause - time.monotonic()))


def member(folder: Path, engines: int, windows: int, seed: int, steps: int) -> dict[str, Any]:
    """One process of a group: waits for the others, takes its steps, and says what they cost."""
    group = join_group(
        "contention",
        limits_of(engines, windows),
        idle_watts=IDLE_WATTS,
        rest_watts=REST_WATTS,
        rest_after_seconds=REST_AFTER_SECONDS,
        label=f"engine {seed}",
        directory=folder,
    )
    while len(group.snapshot(time.monotonic()).engines) < engines:
        time.sleep(0.01)
    engine = Engine(group, seed, time.monotonic())
    live(engine, steps)
    group.leave()
    return {
        "nanoseconds": engine.nanoseconds,
        "claims": group.claims + group.refused,
        "refused": group.refused,
        "static": group.static_steps,
        "lock_wait_seconds": group.lock_wait_seconds,
        "lock_wait_max_seconds": group.lock_wait_max_seconds,
    }


def in_processes(engines: int, windows: int, steps: int) -> Cost:
    """So many processes in one group."""
    with tempfile.TemporaryDirectory(dir=group_directory().parent) as folder:
        command = [sys.executable, "-m", "bench.studies.contention", "--member", folder]
        counts = [str(engines), str(windows), str(steps)]
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [*command, *counts, str(seed)], stdout=subprocess.PIPE, text=True, env=environ
            )
            for seed in range(engines)
        ]
        texts = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise ShaperError("an engine of the group failed; its message is above")
    return _cost(engines, windows, [json.loads(text) for text in texts])


def _cost(engines: int, windows: int, found: Sequence[dict[str, Any]]) -> Cost:
    samples = {
        what: [value / 1e3 for each in found for value in each["nanoseconds"][what]]
        for what in ("query", "reserve", "commit")
    }
    claims = sum(each["claims"] for each in found)
    return Cost(
        engines=engines,
        windows=windows,
        query_microseconds=statistics.median(samples["query"]),
        query_p99_microseconds=float(np.quantile(samples["query"], 0.99)),
        reserve_microseconds=statistics.median(samples["reserve"]),
        reserve_p99_microseconds=float(np.quantile(samples["reserve"], 0.99)),
        commit_microseconds=statistics.median(samples["commit"]),
        lock_wait_microseconds=1e6 * sum(each["lock_wait_seconds"] for each in found) / claims,
        lock_wait_max_microseconds=1e6 * max(each["lock_wait_max_seconds"] for each in found),
        static_ratio=sum(each["static"] for each in found) / claims,
        refused_ratio=sum(each["refused"] for each in found) / claims,
    )


def table(costs: Sequence[Cost]) -> str:
    """The costs as Markdown."""
    head = (
        *("engines", "limits", "query", "p99", "reserve", "p99", "commit"),
        *("lock wait", "at most", "static", "refused"),
    )
    lines = [f"| {' | '.join(head)} |", "| ---: " * len(head) + "|"]
    for cost in costs:
        cells = (
            f"{cost.engines}",
            f"{cost.windows}",
            f"{cost.query_microseconds:.0f}",
            f"{cost.query_p99_microseconds:.0f}",
            f"{cost.reserve_microseconds:.0f}",
            f"{cost.reserve_p99_microseconds:.0f}",
            f"{cost.commit_microseconds:.0f}",
            f"{cost.lock_wait_microseconds:.0f}",
            f"{cost.lock_wait_max_microseconds:,.0f}",
            f"{cost.static_ratio:.2%}",
            f"{cost.refused_ratio:.2%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--engines {text!r}: give numbers of engines, like 1,2,8") from error
    if not all(0 < count <= 64 for count in counts):
        raise ConfigError(f"--engines {text!r}: each must be within 1 to 64")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0, or 2 for wrong input."""
    return one_line("bench.studies.contention", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.studies.contention", description=__doc__)
    parser.add_argument("--engines", default="1,2,8,32", help="numbers of engines")
    parser.add_argument("--steps", type=int, default=300, help="steps of each engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the costs here, too")
    parser.add_argument("--member", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.member:
        folder, engines, windows, steps, seed = options.member
        print(json.dumps(member(Path(folder), int(engines), int(windows), int(seed), int(steps))))
        return 0
    counts = _counts(options.engines)
    if not 10 <= options.steps <= 10_000:
        raise ConfigError(f"--steps {options.steps}: give 10 to 10000")
    check_output(options.json, "--json")
    costs = [in_processes(count, windows, options.steps) for windows in (1, 2) for count in counts]
    print(table(costs))
    if options.json:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
