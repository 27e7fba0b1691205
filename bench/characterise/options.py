"""The command line of `bench.gpu_characterise`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bench.characterise.plan import QUICK, STAGE_SECONDS, STAGES, TOTAL_SECONDS, Plan
from shaper.cli.arguments import Parser

PROGRAM = "bench.gpu_characterise"


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 3600")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def build_parser(description: str) -> argparse.ArgumentParser:
    """The arguments, under a text for `--help`."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stage", choices=(*STAGES, "all"), default="all")
    add("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    add("--model", default="llama-3.1-8b", help="built-in shape or directory with a config.json")
    add("--emulate", metavar="GPU", help="an emulated GPU, like h200-sxm, in place of a real one")
    add("--torch-only", action="store_true", help="bare GEMMs and attention in place of vLLM")
    add("--quick", action="store_true", help="fewer and shorter points, to try it out")
    add("--seconds-per-point", type=_positive, metavar="S")
    add("--idle-seconds", type=_positive, metavar="S")
    add("--total-seconds", type=_positive, default=TOTAL_SECONDS, metavar="S", help="of the run")
    add("--stage-seconds", type=_positive, default=STAGE_SECONDS, metavar="S", help="of a stage")
    add("--attention-backend", metavar="NAME", help="given to vLLM; by default its own choice")
    add("--gpu-memory-utilization", type=_share, default=0.9, metavar="RATIO")
    add("--enforce-eager", action="store_true", help="vLLM without compilation and CUDA graphs")
    add("--top-p", type=_share, default=1.0, help="below 1 the sampler sorts; default 1")
    return parser


def plan_of(options: argparse.Namespace) -> Plan:
    """The points that the options ask for."""
    plan = QUICK if options.quick else Plan()
    changes: dict[str, float] = {}
    if options.seconds_per_point is not None:
        changes["seconds_per_point"] = options.seconds_per_point
    if options.idle_seconds is not None:
        changes["idle_seconds"] = options.idle_seconds
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]
