"""`make demo-rack`: servers of one power group and the same servers unshaped, with no GPU.

Starts two (or more) of vLLM's OpenAI servers over emulated GPUs, replays conversation
traffic at them over HTTP, and does so again with all of them in one power group whose limit
is a share of the highest 100 ms mean power that they reached together. Prints a table and
writes an HTML report, and the figures as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.demo_rack_page import (
    RackComparison,
    about,
    rack_checks,
    rack_page,
    rack_table,
    tokens_per_joule,
)
from bench.harness.options import add_workload_options, count, one_line, ratio, workload
from bench.harness.options import seconds as duration
from bench.harness.progress import Phase, PhaseProgress
from bench.harness.tables import without_nan
from bench.live_rack import RackSettings, rack_phases, run_rack
from shaper.cli.arguments import Parser
from shaper.config.model import build_config
from shaper.core.types import PowerLimit
from shaper.emulator.shapes import known_models
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.report.table import to_text
from shaper.traffic.figures import power_figures

# Two servers, their client and two emulated GPUs share two cores here.
DEFAULT_RATE_HERTZ = 4.0
DEFAULT_SECONDS = 45.0
QUICK_SECONDS = 15.0
MAX_SERVERS = 8
UNSHAPED, DIVIDED, SHARED = "unshaped", "divided", "shared"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        0; 1 if a request failed; 2 where something was wrong with the input or
        a server (one line says what); 130 after Ctrl-C.
    """
    return one_line("bench.demo_rack", lambda: _run(argv), "interrupted; the servers are stopped")


def _parser() -> Parser:
    parser = Parser(prog="python -m bench.demo_rack", description=__doc__.splitlines()[0])
    add_workload_options(parser, DEFAULT_RATE_HERTZ)
    parser.add_argument(
        "--servers", type=count, default=2, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SECONDS:g} s of traffic, for a first look"
    )
    parser.add_argument(
        "--limit-ratio",
        type=ratio,
        default=0.7,
        metavar="SHARE",
        help="the group's limit, as a share of the highest 100 ms mean power of all unshaped "
        "servers together (default: %(default)s)",
    )
    parser.add_argument(
        "--itl-target",
        type=_target,
        default=0.1,
        metavar="TIME",
        help="promise at p99 of the time between two tokens, or none (default: 100ms)",
    )
    parser.add_argument(
        "--divided",
        action="store_true",
        help="run the servers once more, each with its own equal part of the limit",
    )
    parser.add_argument("--gpu", default="h200-sxm", help="emulated GPUs (default: %(default)s)")
    parser.add_argument(
        "--model", default="llama-3.1-8b", help="built-in model shape (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo-rack"),
        metavar="DIR",
        help="where the results go (default: %(default)s)",
    )
    return parser


def _target(text: str) -> float | None:
    return None if text == "none" else duration(text)


def _settings(argv: Sequence[str] | None) -> tuple[RackSettings, tuple[str, ...]]:
    options = _parser().parse_args(argv)
    load_profile(options.gpu)
    if options.model not in known_models():
        raise ConfigError(
            f"--model {options.model!r} is no built-in shape; known: {', '.join(known_models())}"
        )
    if not 2 <= options.servers <= MAX_SERVERS:
        raise ConfigError(f"--servers {options.servers} is not 2 to {MAX_SERVERS}")
    if options.itl_target is not None:
        build_config({"itl_target_seconds": options.itl_target}, "--itl-target")
    default_seconds = QUICK_SECONDS if options.quick else DEFAULT_SECONDS
    if options.trace is not None and options.duration is None:
        options.duration = default_seconds
    load = workload(options, DEFAULT_RATE_HERTZ, default_seconds)
    if len(load.requests) < options.servers:
        raise ConfigError(
            f"{len(load.requests)} requests are too few for {options.servers} servers: give a "
            "longer --duration"
        )
    out: Path = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: {error.strerror}") from error
    settings = RackSettings(
        load,
        out,
        options.servers,
        options.gpu,
        options.model,
        options.limit_ratio,
        itl_target_seconds=options.itl_target,
    )
    return settings, (UNSHAPED, DIVIDED, SHARED) if options.divided else (UNSHAPED, SHARED)


def _run(argv: Sequence[str] | None) -> int:
    settings, names = _settings(argv)
    begin = time.monotonic()
    phases = [*rack_phases(settings, names), Phase("writing the report", 3.0)]
    with PhaseProgress(phases) as progress:
        comparison = compare_rack(settings, names, progress)
        progress.next()
        report = _write(comparison)
    print(f"\n{to_text(rack_table(comparison))}\n")
    words = {True: "holds", False: "DOES NOT HOLD", None: "not judged"}
    for held, text in rack_checks(comparison):
        print(f"{words[held]}: {text}")
    for run in comparison.runs:
        for message, times in run.latency.errors[:3]:
            print(f"{run.name}: {times} requests failed: {message}")
    print(f"\nreport:  {report}\nfigures: {report.with_name('figures.json')}")
    print(f"took {time.monotonic() - begin:.0f} s")
    return 1 if any(run.latency.requests_failed for run in comparison.runs) else 0


def compare_rack(
    settings: RackSettings, names: Sequence[str], progress: PhaseProgress
) -> RackComparison:
    """Run the servers once for each name, the unshaped ones first: they set the limit.

    Raises:
        ServerError: a server did not start or ended by itself.
        TraceError: it left no power trace.
    """
    unshaped = run_rack(settings, UNSHAPED, ("--shaper-off",), progress)
    limit = PowerLimit(
        round(settings.limit_ratio * unshaped.power.peak_watts, 1), settings.window_seconds
    )
    progress.say(
        f"unshaped: highest {settings.window_seconds * 1e3:.0f} ms mean of all "
        f"{unshaped.power.peak_watts:.1f} W; the group's limit is {limit.watts:.1f} W"
    )
    first = replace(unshaped, power=power_figures(unshaped.total, (limit,)))
    others = tuple(
        run_rack(settings, name, shaping(settings, name, limit), progress, (limit,))
        for name in names[1:]
    )
    return RackComparison(settings, limit, (first, *others))


def shaping(settings: RackSettings, name: str, limit: PowerLimit) -> tuple[str, ...]:
    """The flags of each server: a group's limit, or an equal part of it."""
    window = f"{limit.window_seconds * 1e3:g}ms"
    if name == DIVIDED:
        flags: tuple[str, ...] = (
            "--power-limit",
            f"{limit.watts / settings.servers:.1f}W@{window}",
        )
    else:
        # Another demo on this machine shares nothing with this one.
        group = f"demo-rack-{os.getpid()}"
        flags = ("--power-group", group, "--group-limit", f"{limit.watts:.1f}W@{window}")
    if settings.itl_target_seconds is None:
        return flags
    return (*flags, "--itl-target", f"{settings.itl_target_seconds * 1e3:g}ms")


def _write(comparison: RackComparison) -> Path:
    """Writes the report and the figures; returns the report's path."""
    out = comparison.settings.out
    report = out / "report.html"
    report.write_text(rack_page(comparison), encoding="utf-8")
    data = {
        "about": dict(about(comparison)),
        "limit": asdict(comparison.limit),
        "checks": [{"holds": held, "statement": text} for held, text in rack_checks(comparison)],
        "runs": [
            {
                "name": run.name,
                "flags": list(run.arguments),
                "power": asdict(run.power),
                "latency": asdict(run.latency),
                "output_tokens_per_joule": tokens_per_joule(run),
                "machine": None if run.machine is None else asdict(run.machine),
            }
            for run in comparison.runs
        ],
    }
    (out / "figures.json").write_text(json.dumps(without_nan(data), indent=1, allow_nan=False))
    return report


if __name__ == "__main__":
    sys.exit(main())
