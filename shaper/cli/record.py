"""`shaper record`: writes what the GPUs' meters say to a file, with or without a server.

Without `--url` it reads the GPUs of `CUDA_VISIBLE_DEVICES` by itself: samples alone. With
`--url` a running server's engines write their steps and samples on their own host
(`shaper/cli/record_live.py`). `shaper.recording.format` has the format.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shaper import __version__
from shaper.cli.arguments import Parser
from shaper.config.calendar_spans import iso
from shaper.core.model.profile import GpuProfile
from shaper.core.types import GpuSample
from shaper.errors import ConfigError, GpuUnavailableError, TraceError
from shaper.gpu.profiles import load_profile, profile_for_device
from shaper.gpu.reader import GpuReader
from shaper.gpu.sampler import Sampler
from shaper.ipc.wall_clock import wall_seconds
from shaper.recording.format import RecordingWriter
from shaper.units import parse_duration, parse_seconds

DEFAULT_DURATION = "60s"
# A read of one GPU takes about a millisecond; once a minute is no recording of a meter.
_INTERVALS_SECONDS = (0.005, 60.0)
_WRITE_SECONDS = 0.2
_EMULATED_SHAPE = "llama-3.1-8b"


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `shaper record`."""
    parser = Parser(prog="shaper record", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "out",
        metavar="OUT",
        help="a .csv or .parquet; with --url a name in the server's recording directory",
    )
    parser.add_argument(
        "--duration",
        default=DEFAULT_DURATION,
        metavar="TIME",
        help=f"like 10min (default {DEFAULT_DURATION}); Ctrl-C ends it before, with a whole file",
    )
    parser.add_argument("--interval", metavar="TIME", help="between two reads (default 20ms)")
    parser.add_argument("--emulate", metavar="GPU", help="read an idle emulated GPU, to try this")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.add_argument(
        "--url", help="of a running server, whose engines write; it wants SHAPER_ADMIN_KEY"
    )
    parser.add_argument("--why", default="", metavar="TEXT", help="with --url: for its log")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        ConfigError: a wrong argument.
        GpuError: there is no GPU to read.
        ControlError: the server is not there, or refuses.
        TraceError: the file can't be written, at first or later.
    """
    options = build_parser().parse_args(argv)
    duration = _seconds("--duration", options.duration)
    if not duration > 0:
        raise ConfigError(f"--duration {options.duration} is no time")
    if options.url is not None:
        for flag in ("force", "interval", "emulate"):
            if getattr(options, flag):
                raise ConfigError(
                    f"--{flag} and --url exclude each other: the server's engines write, at their "
                    "own interval, and never over a file"
                )
        from shaper.cli.record_live import record_live

        with stopped_by_signals() as stop:
            return record_live(options, duration, stop)
    interval = _seconds("--interval", options.interval or "20ms")
    low, high = _INTERVALS_SECONDS
    if not low <= interval <= high:
        raise ConfigError(f"--interval {options.interval} is outside {low:g} to {high:g} seconds")
    reader = _emulated(options.emulate) if options.emulate else _real()
    try:
        writer = RecordingWriter(
            options.out, _meta(reader, interval, options), replace=options.force
        )
    except TraceError as error:
        reader.close()
        hint = "; --force replaces it" if isinstance(error.__cause__, FileExistsError) else ""
        raise TraceError(f"{error}{hint}") from error
    with stopped_by_signals() as stop:
        return record(reader, writer, duration, interval, stop)


def _seconds(flag: str, text: str) -> float:
    parse = parse_duration if flag == "--duration" and not text.endswith("ms") else parse_seconds
    try:
        seconds = parse(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    assert isinstance(seconds, float)  # of a text
    return seconds


def record(
    reader: GpuReader,
    writer: RecordingWriter,
    duration_seconds: float,
    interval_seconds: float,
    stop: threading.Event,
) -> int:
    """Reads and writes until the time is over or `stop` is set, and closes both.

    A thread of its own reads, so that a driver that hangs does not keep the file open.

    Returns:
        0; 1 where nothing could be read.

    Raises:
        TraceError: the disk is full, or the file can't be finished; what was written stays.
    """
    pending: list[GpuSample] = []
    sampler = Sampler(reader, interval_seconds=interval_seconds, on_samples=pending.extend)
    start = time.monotonic()
    left = duration_seconds
    sampler.start()
    try:
        while left > 0.0:
            stopped = stop.wait(min(_WRITE_SECONDS, left))
            left = 0.0 if stopped else start + duration_seconds - time.monotonic()
            if left <= 0.0:
                sampler.stop()
            samples = pending[:]
            del pending[: len(samples)]
            writer.write(samples=samples)
            if sys.stderr.isatty():
                _show(writer, sampler, duration_seconds - left, duration_seconds, samples)
    except OSError as error:
        writer.release()
        raise TraceError(
            f"the recording ends here: {error.strerror}; {writer.rows} rows are in "
            f"{writer.rows_path}"
        ) from error
    finally:
        sampler.stop()
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    writer.close()
    errors = f", {sampler.read_errors} reads failed" if sampler.read_errors else ""
    print(f"{writer.path}: {writer.rows} rows in {time.monotonic() - start:.1f} s{errors}")
    return 0 if writer.rows else 1


def _show(
    writer: RecordingWriter,
    sampler: Sampler,
    seconds: float,
    of_seconds: float,
    samples: Sequence[GpuSample],
) -> None:
    """One line on a terminal that is written over."""
    last = {sample.gpu_index: sample for sample in samples}
    watts = [s.instant_watts for s in last.values() if s.instant_watts is not None]
    drawn = f"{sum(watts):.0f} W" if watts else "no power read"
    failed = f"  {sampler.read_errors} reads failed" if sampler.read_errors else ""
    print(
        f"\r{seconds:.0f} of {of_seconds:.0f} s  {drawn}  {writer.rows} rows{failed}\033[K",
        end="",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and a closed terminal set; a second one ends the process."""
    stop = threading.Event()

    def ask(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[number])

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before: dict[int, Any] = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _real() -> GpuReader:
    from shaper.gpu.nvml import NvmlReader, host_gpus
    from shaper.gpu.visible import visible_count, visible_gpus

    try:
        count = visible_count(os.environ)
        if count is None:
            count = len(host_gpus())
        if not count:
            raise GpuUnavailableError("no GPU is visible here")
        return NvmlReader(visible_gpus(os.environ, count))
    except GpuUnavailableError as error:
        raise GpuUnavailableError(f"{error} (to try without a GPU, add --emulate GPU)") from error


def _emulated(gpu: str) -> GpuReader:
    from shaper.emulator.device import EmulatedDevice
    from shaper.emulator.shapes import load_shape

    return EmulatedDevice(gpu, load_shape(_EMULATED_SHAPE)).reader


def _meta(
    reader: GpuReader, interval_seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    gpus = reader.gpus
    if options.emulate:
        profiles: list[GpuProfile | None] = [load_profile(options.emulate)]
    else:
        profiles = [profile_for_device(gpu.name) for gpu in gpus]
    # Of GPUs that are not alike there is no one profile to fit or to play back by.
    kinds = {None if profile is None else profile.name for profile in profiles}
    (kind,) = kinds if len(kinds) == 1 else (None,)
    return {
        "version": __version__,
        **({} if kind is None else {"gpu": kind}),
        "gpus": [{"index": gpu.index, "name": gpu.name, "uuid": gpu.uuid} for gpu in gpus],
        "interval_seconds": interval_seconds,
        "at": iso(wall_seconds()),
        "monotonic_seconds": time.monotonic(),
    }
