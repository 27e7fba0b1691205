"""`python -m bench.rack`: a rack of engines under a power limit, and every way to keep it.

Engines run in virtual time (vLLM's real scheduler and KV cache over emulated GPUs, under the
same traffic and seed) unshaped, with vLLM's own knobs, a power cap, a locked clock, a reactive
loop, latency-only chunks, the shaper on each engine, and the shaper with a shared ledger.
Prints a table, and writes a report, the table and all figures into a folder. Runs that are
done are kept there: a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.harness.options import count, one_line, rate, seconds, seed
from bench.harness.runner import Runner, Told
from bench.racks.output import Report, check_writable, write
from bench.racks.plan import (
    LIMIT_RATIOS,
    QUICK_GRID,
    Comparison,
    compare,
    group_sizes,
    limit_of,
    limited,
    prove,
)
from bench.racks.store import Store, rack_runner
from bench.racks.variants import vary
from shaper.cli.arguments import Parser
from shaper.engine.preflight import check_vllm_imports
from shaper.errors import ConfigError
from shaper.simulate.arrivals import loop_seconds
from shaper.simulate.checks import check_setup
from shaper.simulate.router import ROUTERS
from shaper.simulate.setup import RackSetup
from shaper.traffic.synthetic import synthesise
from shaper.traffic.traces import TRACE_FORMATS, load_trace
from shaper.traffic.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
# Reference data beside the checkout; not part of it.
REFERENCE_TRACE = ROOT.parent / "shared" / "data" / "traces" / "azure2023_llm_conv.csv"
ENGINES, QUICK_ENGINES = 8, 2
SECONDS, QUICK_SECONDS, VARIANT_SECONDS = 120.0, 10.0, 60.0
# A rack begins empty: until it is full, slower decodes make fewer tokens, and later they don't.
WARM_UP_RATIO, WARM_UP_SECONDS = 1.0 / 6.0, 20.0
RATE_HERTZ = 5.0
FULL_SEEDS = 5
QUICK_RATIOS = (0.70,)


def _ratios(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0.9,0.7") from error
    if not all(0.0 < each < 1.0 for each in found):
        raise argparse.ArgumentTypeError(f"{text!r}: a limit is a share of the unshaped peak, "
                                         "above 0 and below 1")  # fmt: skip
    return tuple(sorted(set(found), reverse=True))


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="python -m bench.rack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--quick", action="store_true", help="2 engines, 10 s, one limit: a first look"
    )
    kind.add_argument(
        "--full",
        action="store_true",
        help="unshaped and the shared ledger at 0.85 and 0.70, five seeds, against the aims",
    )
    kind.add_argument(
        "--sensitivity",
        action="store_true",
        help="how the result at 0.70 moves with what the shaper does not know",
    )
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("--trace", type=Path, metavar="FILE", help="recorded traffic")
    traffic.add_argument("--format", choices=TRACE_FORMATS, default="auto", help="of the trace")
    traffic.add_argument(
        "--rate", type=rate, default=RATE_HERTZ, help="requests a second and engine (%(default)g)"
    )
    traffic.add_argument("--duration", type=seconds, metavar="TIME", help="(120s for 8 engines)")
    traffic.add_argument(
        "--warm-up",
        type=seconds,
        metavar="TIME",
        help="of it, left out of latency, throughput and cost (a sixth, 20s at most)",
    )
    traffic.add_argument("--seed", type=seed, default=0, help="the first, with --full (0)")
    traffic.add_argument(
        "--seeds", type=count, default=FULL_SEEDS, help="how many, with --full (%(default)s)"
    )
    rack = parser.add_argument_group("rack")
    rack.add_argument("--engines", type=count, help=f"({ENGINES})")
    rack.add_argument("--gpu", default="h200-sxm", help="name or path of a profile (%(default)s)")
    rack.add_argument("--model", default="llama-3.1-8b", help="(%(default)s)")
    rack.add_argument("--tensor-parallel-size", type=count, default=1, help="(1)")
    rack.add_argument("--router", choices=sorted(ROUTERS), default="split", help="(%(default)s)")
    rack.add_argument(
        "--limits", type=_ratios, metavar="RATIOS", help="of the unshaped peak (0.9,0.8,0.7,0.6)"
    )
    output = parser.add_argument_group("running")
    output.add_argument("--processes", type=count, help="(one a core)")
    output.add_argument("--out", type=Path, default=Path("out/rack"), help="(%(default)s)")
    output.add_argument("--json", type=Path, metavar="FILE", help="a copy of the figures")
    output.add_argument("--fresh", action="store_true", help="forget runs that are done")
    return parser


def workload_of(options: argparse.Namespace, rack_seconds: float, engines: int) -> Workload:
    """The traffic that is asked for, else the reference trace, else drawn conversation.

    Raises:
        TraceError: the trace has a broken line or can't be read.
    """
    if options.trace is not None:
        needed = options.rate * rack_seconds * engines + 1
        return load_trace(options.trace, options.format, seconds=0.0, requests=needed)
    if REFERENCE_TRACE.is_file():
        return load_trace(REFERENCE_TRACE, "azure")
    # Long enough that no two engines get the same stretch.
    return synthesise(rack_seconds * engines, options.rate)


def rack_of(options: argparse.Namespace) -> RackSetup:
    """The unshaped rack, at the trace's own rate.

    Raises:
        ConfigError: there is no such rack, or options don't go together.
    """
    if options.limits is not None and (options.full or options.sensitivity):
        raise ConfigError("--limits: --full and --sensitivity have limits of their own")
    engines = options.engines or (QUICK_ENGINES if options.quick else ENGINES)
    usual = VARIANT_SECONDS if options.sensitivity else SECONDS
    # A larger group runs for less time, so that the comparison takes as long.
    duration = QUICK_SECONDS if options.quick else usual * min(1.0, ENGINES / engines)
    duration = options.duration or duration
    rack = RackSetup(
        gpu=options.gpu,
        model=options.model,
        tensor_parallel=options.tensor_parallel_size,
        engines=engines,
        duration_seconds=duration,
        warm_up_seconds=options.warm_up or min(WARM_UP_SECONDS, duration * WARM_UP_RATIO),
        router=options.router,
        seed=options.seed,
        shaped=False,
    )
    check_setup(rack)
    return rack


@dataclass(slots=True)
class Follower:
    """Prints each run as it ends. Mutable state: what it was told."""

    began_seconds: float
    told: list[Told]

    def __call__(self, told: Told) -> None:
        """See the class."""
        self.told.append(told)
        found = told.outcome
        speed = f"{found.engine_seconds_per_second:.1f} engine-seconds a second"
        if found.ledger_seconds:
            speed += f", ledger {found.ledger_microseconds:.0f} us a decision"
        when = "kept" if told.kept else f"{time.monotonic() - self.began_seconds:.0f} s"
        place = f"[{told.done} of {told.known} or more, {when}]"
        print(f"{place} {told.name}: {speed}", file=sys.stderr, flush=True)


def _compare(options: argparse.Namespace, runner: Runner, rack: RackSetup) -> Comparison:
    if options.full:
        return prove(runner, rack, range(options.seed, options.seed + options.seeds))
    if options.sensitivity:
        return vary(runner, rack, options.out)
    ratios = options.limits or (QUICK_RATIOS if options.quick else LIMIT_RATIOS)
    return compare(runner, rack, ratios, QUICK_GRID if options.quick else None)


def _ledger_lines(runner: Runner, found: Comparison) -> list[str]:
    """What a decision costs in the ledger by the number of engines, for large groups."""
    rack = found.rack
    if rack.engines <= ENGINES:
        return []
    before = found.references[min(found.references)].unshaped
    limit = limit_of(limited(rack, before, QUICK_RATIOS[0]))
    (sizes,) = runner.drive([group_sizes(rack, limit)])
    return [
        f"shared ledger, {engines} engines: {outcome.ledger_microseconds:.0f} us a decision, "
        f"{outcome.ledger_microseconds / engines:.2f} us a decision and engine"
        for engines, outcome in sizes
    ]


def _run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    rack = rack_of(options)
    check_writable([options.json])
    check_vllm_imports()
    workload = workload_of(options, rack.duration_seconds, rack.engines)
    recorded = len(workload.requests) / loop_seconds(workload)
    rack = replace(rack, rate_scale=options.rate / recorded)
    store = Store(options.out / "runs")
    if options.fresh:
        store.clear()
    notes = []
    if options.trace is None and not REFERENCE_TRACE.is_file():
        notes.append("The reference trace is not there: the traffic is drawn conversation.")
    follower = Follower(began, [])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    heading = [
        f"{rack.engines} engines, {workload.name}, {rack.duration_seconds:g} s, "
        f"{options.rate:g} requests/s an engine",
        *notes,
    ]
    print("\n".join(heading), file=sys.stderr)
    with rack_runner(workload, store, options.processes or cores or 1, follower) as runner:
        found = _compare(options, runner, rack)
        lines = _ledger_lines(runner, found)
    too_long = next(iter(found.references.values())).unshaped.too_long_requests
    if too_long:
        notes.append(f"{too_long} requests don't fit the model's context and were left out.")
    report = Report(
        found, workload.name, options.rate, tuple(notes), tuple(lines), tuple(follower.told),
        time.monotonic() - began,
    )  # fmt: skip
    print(write(report, options.out, options.json))
    return 1 if options.full and not all(each.met for each in report.verdicts) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        0; 1 when `--full` missed an aim; 2 when something could not run; 130 when stopped.
    """
    return one_line(
        "bench.rack",
        lambda: _run(build_parser().parse_args(argv)),
        "stopped; the same command goes on from here",
    )


if __name__ == "__main__":
    sys.exit(main())
