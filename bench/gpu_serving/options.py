"""The command line of `bench.gpu_serve`, and the settings that come of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.gpu_serving import plan
from bench.gpu_serving.plan import parse_knobs, runs
from bench.gpu_serving.store import Settings, read_settings
from bench.harness.options import count, rate, ratio, recorded_workload, seconds, seed
from shaper.cli.arguments import Parser
from shaper.config.model import build_config
from shaper.emulator.shapes import load_model_config
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.traffic.synthetic import synthesise
from shaper.traffic.traces import TRACE_FORMATS
from shaper.traffic.workload import Workload

PROGRAM = "bench.gpu_serve"
SERVE, VIRTUAL, REPORT, ALL = "serve", "virtual", "report", "all"

DEFAULT_RATE_HERTZ = 8.0
"""Of a real H200: by the shipped profile in virtual time (docs/gpu-serve.md) three quarters of
its power on average, and 0.70 of its peak can still serve it."""
EMULATED_RATE_HERTZ = 3.0
"""Server, client and emulated GPU share this machine's CPUs."""
DEFAULT_SECONDS = 45.0
QUICK_SECONDS = 8.0
WARM_UP_SECONDS = 6.0
QUICK_WARM_UP_SECONDS = 2.0
DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_BUDGETS = (0.85, 0.70)
DEFAULT_ITL_SECONDS = 0.050
DEFAULT_STATIC = "2048x64"


def build_parser(description: str) -> Parser:
    """The arguments, under a text for `--help`."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    add(
        "--stage",
        nargs="+",
        metavar="NAME",
        help="runs by name, like unshaped shaped-85 static shaped-85-itl; serve (all runs), "
        "virtual, report, or all (default); a run that is asked for by name is run again",
    )
    add("--emulate", metavar="GPU", help="an emulated GPU, like h200-sxm, in place of a real one")
    add("--quick", action="store_true", help=f"{QUICK_SECONDS:g} s of traffic, to try it out")
    add("--pack", type=Path, metavar="DIR", help="write the small form of the recordings there")
    add("--profile", metavar="NAME|FILE", help="to predict with; by default the recording's own")
    add("--force", action="store_true", help="start although the GPU is not idle")
    add("--total-seconds", type=seconds, default=plan.TOTAL_SECONDS, metavar="TIME")
    add("--stage-seconds", type=seconds, default=plan.STAGE_SECONDS, metavar="TIME")
    once = parser.add_argument_group("settled by the first call for a folder")
    add = once.add_argument
    add("--model", help=f"built-in shape or config directory (default: {DEFAULT_MODEL})")
    add("--duration", type=seconds, metavar="TIME", help=f"of arrivals ({DEFAULT_SECONDS:g}s)")
    add("--rate", type=rate, metavar="PER_SECOND", help=f"requests ({DEFAULT_RATE_HERTZ:g})")
    add("--seed", type=seed, metavar="N", help="of the traffic (default: 0)")
    add("--trace", type=Path, metavar="FILE", help="recorded traffic in place of synthetic")
    add("--format", choices=TRACE_FORMATS, help="of the trace (default: by what is in it)")
    add("--budgets", metavar="RATIOS", help="of the unshaped 100 ms peak (default: 0.85,0.70)")
    add("--itl-target", type=seconds, metavar="TIME", help="of the -itl runs (default: 50ms)")
    add("--static", metavar="TOKENSxSEQS", help=f"vLLM's static knobs ({DEFAULT_STATIC})")
    engine = parser.add_argument_group("vLLM")
    add = engine.add_argument
    add("--attention-backend", metavar="NAME", help="given to vLLM; by default its own choice")
    add("--enforce-eager", action="store_true", help="no compilation and no CUDA graphs")
    add("--gpu-memory-utilization", type=ratio, default=0.9, metavar="RATIO")
    add("--max-model-len", type=count, default=16384, metavar="TOKENS")
    return parser


def settings_of(options: argparse.Namespace, folder: Path) -> tuple[Settings, bool]:
    """The folder's settings, and whether they are new.

    Raises:
        ConfigError: something is wrong, or contradicts what the folder was started with.
        TraceError: a broken trace.
    """
    before = read_settings(folder)
    if before is not None:
        _check_same(options, before)
        return before, False
    if options.emulate:
        load_profile(options.emulate)
    model = options.model or DEFAULT_MODEL
    load_model_config(model)
    itl = options.itl_target or DEFAULT_ITL_SECONDS
    build_config({"itl_target_seconds": itl}, "--itl-target")
    settings = Settings(
        emulate=options.emulate,
        model=model,
        workload=_workload(options),
        runs=runs(budgets(options.budgets), itl, parse_knobs(options.static or DEFAULT_STATIC)),
        warm_up_seconds=QUICK_WARM_UP_SECONDS if options.quick else WARM_UP_SECONDS,
    )
    longest = max(r.prompt_tokens + r.output_tokens for r in settings.workload.requests)
    if longest > options.max_model_len:
        raise ConfigError(
            f"a request of {longest} tokens does not fit --max-model-len {options.max_model_len}"
        )
    return settings, True


def _check_same(options: argparse.Namespace, before: Settings) -> None:
    """What the first call has settled can't be changed: the runs would not compare."""
    if options.emulate is not None and options.emulate != before.emulate:
        raise ConfigError(
            f"--out {options.out} holds measurements of {before.source}: give another folder "
            f"for {options.emulate}"
        )
    given = [
        f"--{name.replace('_', '-')}"
        for name in (
            "duration",
            "rate",
            "seed",
            "trace",
            "format",
            "budgets",
            "itl_target",
            "static",
        )
        if getattr(options, name) is not None
    ]
    if options.model is not None and options.model != before.model:
        given.append("--model")
    if given:
        raise ConfigError(
            f"{', '.join(given)}: --out {options.out} was started with its own traffic and runs; "
            "leave it out, or give another folder"
        )


def budgets(text: str | None) -> tuple[float, ...]:
    """Shares of the peak from `0.85,0.70`.

    Raises:
        ConfigError: no number, out of range, or too many.
    """
    if text is None:
        return DEFAULT_BUDGETS
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--budgets {text!r} is not like 0.85,0.70") from error
    if not all(0.3 <= each < 1.0 for each in found):
        raise ConfigError(f"--budgets {text!r}: each is a share of the peak from 0.3 to below 1")
    if len(found) > plan.MOST_BUDGETS:
        raise ConfigError(f"--budgets {text!r}: {plan.MOST_BUDGETS} at most")
    return found


def _workload(options: argparse.Namespace) -> Workload:
    duration = options.duration or (QUICK_SECONDS if options.quick else DEFAULT_SECONDS)
    number = options.seed or 0
    if options.trace is None:
        default = EMULATED_RATE_HERTZ if options.emulate else DEFAULT_RATE_HERTZ
        found = synthesise(duration, options.rate or default, number)
    else:
        found = recorded_workload(
            options.trace, options.format or "auto", number, options.rate, duration
        )
    if not found.requests:
        raise ConfigError("no request arrives in that time; give a longer --duration")
    return found


def stage_names(options: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    """The stages to do, in order.

    Raises:
        ConfigError: one that is not there.
    """
    everything = tuple(run.name for run in settings.runs)
    asked = options.stage or ([] if options.pack else [ALL])
    found: list[str] = []
    for name in asked:
        if name == ALL:
            found += [*everything, VIRTUAL, REPORT]
        elif name == SERVE:
            found += everything
        elif name in (VIRTUAL, REPORT):
            found.append(name)
        else:
            found.append(settings.run(name).name)
    return tuple(dict.fromkeys(found))
