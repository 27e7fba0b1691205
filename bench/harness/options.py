"""Command-line options that the load tests share."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from bench.harness.servers import ServerError
from shaper.errors import ConfigError, ShaperError
from shaper.traffic.synthetic import load_summary, synthesise
from shaper.traffic.traces import TRACE_FORMATS, TraceFormat, load_trace
from shaper.traffic.workload import Workload
from shaper.units import parse_seconds


class Termination:
    """Within it SIGTERM does what Ctrl-C does: it raises `KeyboardInterrupt`."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def one_line(program: str, run: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a command. SIGTERM does what Ctrl-C does.

    Returns:
        What `run` returns; 2 after an error that is raised on purpose, which is one line on
        stderr (with the end of a server's log under it); 130 after an interrupt.
    """
    try:
        with Termination():
            return run()
    except ServerError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except ShaperError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: {stopped}", file=sys.stderr)
        return 130


MAX_DURATION_SECONDS = 24 * 3600.0
MAX_RATE_HERTZ = 1000.0


def seconds(text: str) -> float:
    """A duration such as `60s`, `2min` or `500ms`; a bare number is seconds."""
    try:
        value = float(text)
    except ValueError:
        try:
            value = float(str(parse_seconds(text)))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    if not 0 < value <= MAX_DURATION_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and up to 24 hours")
    return value


def rate(text: str) -> float:
    """Requests per second."""
    return _above_zero(text, MAX_RATE_HERTZ, " requests/s")


def ratio(text: str) -> float:
    """A share above 0 and up to 2."""
    return _above_zero(text, 2.0)


def _above_zero(text: str, most: float, unit: str = "") -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number{unit and f' of{unit}'}"
        ) from error
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and up to {most:g}{unit}")
    return value


def seed(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def add_workload_options(parser: argparse.ArgumentParser, default_rate: float | None) -> None:
    """`--duration`, `--rate`, `--seed`, `--trace`, `--trace-format`."""
    shown = load_summary().rate_hertz if default_rate is None else default_rate
    group = parser.add_argument_group("traffic")
    group.add_argument(
        "--duration",
        type=seconds,
        metavar="TIME",
        help="requests arrive for this long, like 60s (default: 60s; a trace: all of it)",
    )
    group.add_argument(
        *("--rate", "--request-rate"),
        type=rate,
        metavar="PER_SECOND",
        help=f"mean requests per second (default: {shown:g}; a trace: as recorded, "
        "else its times are stretched)",
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the traffic")
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="replay recorded traffic in place of synthetic: Azure's or BurstGPT's CSV, Mooncake's "
        "JSONL or vLLM's timed trace",
    )
    group.add_argument(
        *("--trace-format", "--format"),
        choices=TRACE_FORMATS,
        default="auto",
        help="what the trace file is (default: told by its content)",
    )


def recorded_workload(
    path: Path,
    trace_format: TraceFormat,
    number: int,
    rate_hertz: float | None,
    duration_seconds: float | None,
) -> Workload:
    """The part of a trace that arrives in a time, read as far as that needs.

    Args:
        path: of the trace.
        trace_format: of it.
        number: the seed of its text.
        rate_hertz: mean requests a second to which its times are stretched; None: as recorded.
        duration_seconds: None: all of it.

    Raises:
        TraceError: the trace has a broken line or can't be read.
    """
    if duration_seconds is None:
        found = load_trace(path, trace_format, number)
    elif rate_hertz is None:
        found = load_trace(path, trace_format, number, seconds=duration_seconds)
    else:
        needed = rate_hertz * duration_seconds + 1
        found = load_trace(path, trace_format, number, seconds=0.0, requests=needed)
    if rate_hertz is not None:
        found = found.at_rate(rate_hertz)
    return found if duration_seconds is None else found.clipped(duration_seconds)


def workload(
    options: argparse.Namespace, default_rate: float | None, default_seconds: float
) -> Workload:
    """The traffic that the options of `add_workload_options` ask for.

    Raises:
        TraceError: the trace has a broken line or can't be read.
        ConfigError: no request is left.
    """
    duration: float | None = options.duration
    if options.trace is None:
        chosen = synthesise(duration or default_seconds, options.rate or default_rate, options.seed)
    else:
        chosen = recorded_workload(
            options.trace, options.trace_format, options.seed, options.rate, duration
        )
    if not chosen.requests:
        raise ConfigError("no request arrives in that time; give a longer --duration")
    return chosen
