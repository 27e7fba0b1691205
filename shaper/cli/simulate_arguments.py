"""The arguments of `shaper simulate`, and the rack and traffic that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from shaper.cli.arguments import Parser, add_settings
from shaper.config.group import group_terms
from shaper.config.suggest import suggest
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError
from shaper.simulate.arrivals import check_count
from shaper.simulate.policies import POLICY_NAMES
from shaper.simulate.router import ROUTERS
from shaper.simulate.setup import NO_ERRORS, Errors, RackSetup
from shaper.traffic.synthetic import load_summary, synthesise
from shaper.traffic.traces import TRACE_FORMATS, load_trace
from shaper.traffic.workload import Workload
from shaper.units import parse_duration, parse_hertz, parse_seconds, parse_watts

DESCRIPTION = """\
A rack of engines in virtual time, and the figures of a run.

Each engine is vLLM's real scheduler and KV-cache manager with the real shaper, over
emulated GPUs of its own; nothing sleeps and nothing is served. It answers what power
budget some traffic can run in: try a limit with --group-limit, or find the lowest one
with --search-limit. The meters' errors, an error of the step model and what the host is
late by are drawn from the seed; --exact leaves them out.
"""
CONVERSATION = "conversation"


def _one_of(kind: str, words: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(
                f"{kind} {text!r} is not known; {suggest(text, words, 'known:')}"
            )
        return text

    return check


def _quantity(parse: Callable[[object], object]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(str(parse(text)))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if not 0.0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
        return value

    return read


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to a million")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _number(text: str) -> float:
    return _quantity(float)(text)  # type: ignore[arg-type]


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `shaper simulate`."""
    parser = Parser(
        prog="shaper simulate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_traffic(parser.add_argument_group("traffic"))
    _add_rack(parser.add_argument_group("rack"))
    _add_power(parser.add_argument_group("power and promises"))
    _add_search(parser.add_argument_group("search"))
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    group.add_argument("--report", type=Path, metavar="OUT.html", help="write a report here")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trace",
        default=CONVERSATION,
        metavar="FILE|conversation",
        help="recorded traffic, or conversation traffic drawn from the seed (default)",
    )
    group.add_argument(
        "--format",
        type=_one_of("format", TRACE_FORMATS),
        default="auto",
        help=f"of the file: {', '.join(TRACE_FORMATS)} (default: by what is in it)",
    )
    group.add_argument(
        "--rate-scale",
        type=_number,
        default=1.0,
        metavar="FACTOR",
        help="let the trace run so many times as fast; each engine gets the trace's rate (1)",
    )
    group.add_argument(
        "--duration",
        dest="duration_seconds",
        type=_quantity(_duration),
        default=600.0,
        metavar="TIME",
        help="(600s)",
    )
    group.add_argument(
        "--warm-up",
        dest="warm_up_seconds",
        type=_warm_up,
        metavar="TIME",
        help="of the run's start, left out of latency, throughput and cost, but not of limits and "
        "peaks (a sixth of the run, at most 20s)",
    )
    group.add_argument(
        "--router",
        type=_one_of("router", tuple(ROUTERS)),
        default="split",
        help=f"{', '.join(ROUTERS)} (default: split, a segment of the trace for each engine)",
    )
    group.add_argument("--seed", type=_seed, default=0)


def _duration(value: object) -> object:
    return float(value) if isinstance(value, str) and _is_number(value) else parse_duration(value)


def _warm_up(text: str) -> float:
    return 0.0 if text in ("0", "0s") else _quantity(_duration)(text)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _add_rack(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--engines", type=_count, default=8)
    group.add_argument("--gpu", default="h200-sxm", help="name of a GPU profile, or a path to one")
    group.add_argument(
        "--model", default="llama-3.1-8b", help="built-in shape, or a Hugging Face config directory"
    )
    group.add_argument(
        *("--tensor-parallel-size", "--tp"),
        dest="tensor_parallel",
        type=_count,
        default=1,
        help="GPUs of each engine",
    )
    group.add_argument("--max-num-batched-tokens", type=_count, default=8192)
    group.add_argument("--max-num-seqs", type=_count, default=1024)
    group.add_argument(
        "--gpu-power-cap",
        dest="gpu_power_cap_watts",
        type=_quantity(parse_watts),
        metavar="WATTS",
        help="of each GPU, held by the emulated driver through its clock",
    )
    group.add_argument(
        "--gpu-clock",
        dest="gpu_clock_hertz",
        type=_quantity(parse_hertz),
        metavar="MHZ",
        help="lock each GPU's clock here",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="GPUs, meters and hosts are just as the shaper believes",
    )


def _add_power(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--policy",
        type=_one_of("policy", POLICY_NAMES),
        default="predictive",
        help=f"{', '.join(POLICY_NAMES)}; fixed leaves vLLM alone; those after it need a clone",
    )
    settings = (
        *("objective", "limits", "group_limits", "host_overhead_watts", "psu_efficiency_ratio"),
        *("ttft_target_seconds", "itl_target_seconds"),
    )
    add_settings(group, *settings)
    group.set_defaults(limits=[], group_limits=[], objective="latency")
    group.set_defaults(**dict.fromkeys(settings[3:]))
    group.add_argument(
        "--static-prefill-tokens",
        dest="prefill_tokens_cap",
        type=_count,
        help="of each step, for --policy static",
    )
    group.add_argument(
        "--static-running-requests",
        dest="running_requests_cap",
        type=_count,
        help="at once, for --policy static",
    )


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--search-limit",
        action="store_true",
        help="find the lowest group limit at which p99 TTFT and ITL stay within the factors of "
        "the unshaped group; about eight runs",
    )
    group.add_argument("--ttft-factor", type=_number, default=1.25, metavar="FACTOR", help="(1.25)")
    group.add_argument(
        "--itl-factor",
        type=_number,
        default=1.25,
        metavar="FACTOR",
        help="(1.25); p99 ITL may also grow up to --itl-target",
    )
    group.add_argument(
        "--search-window",
        type=_quantity(parse_seconds),
        default=0.1,
        metavar="TIME",
        help="(100ms)",
    )


def _group_limits(arguments: argparse.Namespace) -> tuple[PowerLimit, ...]:
    """Of the GPUs, from what is given of them or of the server."""
    limits = tuple(arguments.group_limits)
    wall = (arguments.host_overhead_watts, arguments.psu_efficiency_ratio)
    if not limits and wall == (None, None):
        return ()
    try:
        terms = group_terms("rack" if limits else None, limits, *wall)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return () if terms is None else terms.limits


def setup_of(arguments: argparse.Namespace) -> RackSetup:
    """The rack that the arguments ask for.

    A group's limit is kept by the shared ledger, which only the predictive policy asks; the
    reactive one gets an even share of it as a limit of its own.

    Raises:
        ConfigError: a limit is none, or limits contradict each other.
    """
    limits = tuple(arguments.limits)
    group_limits = _group_limits(arguments)
    if arguments.policy == "reactive" and not limits:
        limits = tuple(
            PowerLimit(limit.watts / arguments.engines, limit.window_seconds)
            for limit in group_limits
        )
    found = vars(arguments)
    given = {field.name: found[field.name] for field in fields(RackSetup) if field.name in found}
    if given["warm_up_seconds"] is None:
        given["warm_up_seconds"] = min(20.0, arguments.duration_seconds / 6.0)
    return RackSetup(
        **given
        | {
            "limits": limits,
            "group_limits": group_limits,
            "shared": arguments.policy == "predictive",
            "errors": NO_ERRORS if arguments.exact else Errors(),
        }
    )


def workload_of(arguments: argparse.Namespace) -> Workload:
    """The traffic that the arguments ask for.

    Raises:
        ConfigError: it would be too much.
        TraceError: the file can't be read.
    """
    # A segment of its own for each engine.
    seconds = arguments.duration_seconds * arguments.engines * arguments.rate_scale
    if arguments.trace != CONVERSATION:
        return load_trace(Path(arguments.trace), arguments.format, arguments.seed, seconds=seconds)
    check_count(seconds * load_summary().rate_hertz)
    return synthesise(seconds, seed=arguments.seed)
