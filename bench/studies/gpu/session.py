"""One stage over an engine: the load, the meter beside it, the time left, and what was found."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.studies.gpu.engine import EngineRunner
from bench.studies.gpu.plan import Budget, Plan
from bench.studies.gpu.points import Point, make_point
from shaper.core.types import GpuSample
from shaper.errors import GpuError
from shaper.gpu.meter_properties import MeterWatch
from shaper.gpu.reader import GpuReader
from shaper.recording.format import RecordedStep, RecordingWriter


class MeterThread:
    """Samples until it is stopped. A failed read is counted and leaves a hole.

    Args:
        reader: read from this thread only while it runs; not closed here.
        interval_seconds: from read to read; a read that takes longer skips the next.
    """

    def __init__(self, reader: GpuReader, interval_seconds: float) -> None:
        self._reader = reader
        self._interval_seconds = interval_seconds
        self._samples: list[GpuSample] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="study-meter", daemon=True)
        self._watch = MeterWatch()
        self.errors = 0

    def start(self) -> None:
        """Start to sample."""
        self._thread.start()

    def take(self) -> list[GpuSample]:
        """The samples since the last take."""
        with self._lock:
            samples, self._samples = self._samples, []
        return samples

    def facts(self) -> dict[str, Any]:
        """Refresh and window of its readings, and what a read costs; None where not told."""
        facts = self._watch.facts()
        return dataclasses.asdict(facts[0]) if facts else {}

    def stop(self) -> None:
        """Stop to sample. May be called twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                found = self._reader.read()
            except GpuError:
                self.errors += 1
            else:
                self._watch.observe(found, time.monotonic() - begin)
                with self._lock:
                    self._samples.extend(found)
            due += self._interval_seconds
            now = time.monotonic()
            if due < now:
                due = now + self._interval_seconds - (now - due) % self._interval_seconds
            self._stopping.wait(due - now)


@dataclass(slots=True)
class Session:
    """One stage. `runner` and `meter` are its caller's; the rest is what it has found."""

    stage: str
    plan: Plan
    budget: Budget
    runner: EngineRunner
    meter: MeterThread
    writer: RecordingWriter
    say: Callable[[str], None]
    points: list[Point] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    out_of_time: bool = False
    """A point was left out for want of time: the stage is not done."""
    findings: dict[str, Any] = field(default_factory=dict)

    def collect(self) -> tuple[list[RecordedStep], list[GpuSample]]:
        """Moves what was logged since the last call to the recording, and returns it."""
        steps, samples = self.runner.take_steps(), self.meter.take()
        self.writer.write(steps, samples)
        return steps, samples

    def measure(
        self, settings: Mapping[str, float], run: Callable[[], object], when: str = ""
    ) -> tuple[Point, list[GpuSample]]:
        """Runs a load between two times at which no step is under way, and sums it up."""
        self.runner.drain()
        self.collect()
        start = time.monotonic()
        run()
        self.runner.drain()
        end = time.monotonic()
        steps, samples = self.collect()
        point = make_point(self.stage, settings, (start, end), steps, samples, when)
        self.points.append(point)
        watts = "no energy reading" if point.watts is None else f"{point.watts:.1f} W"
        length = "" if point.step_seconds is None else f", {point.step_seconds * 1e3:.2f} ms a step"
        self.say(f"{self.stage}: {point.label()}: {watts}{length}")
        return point, samples

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether a point fits; if not, it is noted as skipped."""
        if seconds <= self.budget.left_seconds:
            return True
        self.out_of_time = True
        return self.skip(f"{what}: {seconds:.0f} s don't fit the time left")

    def has_cache(self, what: str, tokens: int) -> bool:
        """Whether so many tokens fit the KV cache; if not, it is noted as skipped."""
        have = self.runner.kv_tokens
        if tokens <= have:
            return True
        return self.skip(f"{what}: {tokens} tokens, and the KV cache holds {have}")

    def skip(self, why: str) -> bool:
        """Notes what was left out, and says so. Always False."""
        self.skipped.append(f"{self.stage}: {why}")
        self.say(f"{self.stage}: skipped {why}")
        return False
