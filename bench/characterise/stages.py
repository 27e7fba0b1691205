"""The stages that run steps: idle, cadence, decode and prefill; `waves.py` has the meter's.

Each point starts from a fresh load, lets it settle, and is measured between two times
at which no step is under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.characterise.plan import Budget, Plan
from bench.characterise.points import Point, make_point
from bench.characterise.runner import Runner
from bench.characterise.sampling import MeterThread
from shaper.core.types import GpuSample
from shaper.emulator.host import sleep_until
from shaper.errors import ShaperError
from shaper.recording.format import RecordedStep, RecordingWriter

# What a first step is taken to last; later points go by those before.
_FIRST_GUESS_SECONDS = 0.007
_CHUNK_TOKENS_PER_SECOND = 30_000.0
_FEWEST_STEPS = 16


@dataclass(slots=True)
class Session:
    """One run: the load, the meter, the time left and what was found."""

    plan: Plan
    budget: Budget
    runner: Runner
    meter: MeterThread
    writer: RecordingWriter
    points: list[Point] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    steps: list[RecordedStep] = field(default_factory=list)
    """All that were recorded so far."""
    driver: bool = False
    """Whether NVIDIA's driver can be asked beside the runner's reader."""
    say: Callable[[str], None] = print

    def collect(self) -> tuple[list[RecordedStep], list[GpuSample]]:
        """Moves what was logged since the last call to the recording, and returns it."""
        steps, samples = self.runner.take_steps(), self.meter.take()
        self.writer.write(steps, samples)
        self.steps += steps
        return steps, samples

    def measure(
        self,
        stage: str,
        settings: Mapping[str, float],
        run: Callable[[], object],
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[Point, list[RecordedStep], list[GpuSample]]:
        """Runs and sums up. What the load was is the caller's business."""
        self.runner.drain()
        self.collect()
        start = time.monotonic()
        run()
        self.runner.drain()
        end = time.monotonic()
        steps, samples = self.collect()
        point = make_point(stage, settings, (start, end), steps, samples, extra)
        self.points.append(point)
        watts = "no energy reading" if point.watts is None else f"{point.watts:.1f} W"
        length = "" if point.step_seconds is None else f", {point.step_seconds * 1e3:.2f} ms a step"
        self.say(f"{stage}: {point.label()}: {watts}{length}")
        return point, steps, samples

    def has_time(self, stage: str, what: str, seconds: float) -> bool:
        """Whether a point fits; if not, it is noted as skipped."""
        if self.budget.fits(seconds):
            return True
        self.skip(stage, f"{what}: {seconds:.0f} s don't fit the time left")
        return False

    def skip(self, stage: str, why: str) -> None:
        """Notes what was left out, and says so."""
        self.skipped.append(f"{stage}: {why}")
        self.say(f"{stage}: skipped {why}")


def warm_up(runner: Runner) -> None:
    """One load of each kind, not recorded: kernels that are compiled at their first use."""
    runner.start_decodes(2, 64)
    _run_steps(runner, 8, 60.0)
    runner.start_chunks(64, 256, 2)
    _run_steps(runner, 3, 60.0)
    runner.clear()
    runner.take_steps()


def idle(session: Session, what: str) -> None:
    """Nothing runs; the engine is there."""
    seconds = session.plan.idle_seconds
    session.runner.clear()
    if session.has_time("idle", what, seconds):
        session.measure("idle", {}, lambda: time.sleep(seconds), {"when": what})


def cadence(session: Session) -> None:
    """Decode steps at a fixed period: what the GPU draws between them."""
    plan = session.plan
    for batch in plan.cadence_batches:
        for period in plan.cadence_seconds:
            count = max(_FEWEST_STEPS, int(plan.seconds_per_point / period))
            prompt = max(16, plan.cadence_context_tokens - count // 2)
            what = f"batch {batch} every {period * 1e3:g} ms"
            if not _decodes_fit(session, "cadence", what, batch, prompt + count):
                continue
            if not session.has_time("cadence", what, count * period + 2.0):
                continue
            session.runner.start_decodes(batch, prompt)
            _paced(session.runner, period, max(4, int(plan.settle_seconds / period)))
            settings = {"batch": batch, "cadence_seconds": period}
            session.measure("cadence", settings, _pacer(session.runner, period, count))
    session.runner.clear()


def decode(session: Session) -> None:
    """Decode steps back to back."""
    plan = session.plan
    for context in plan.contexts_tokens:
        guess = _FIRST_GUESS_SECONDS
        for batch in plan.decode_batches:
            count = int(plan.seconds_per_point / guess)
            count = max(_FEWEST_STEPS, min(count, 2 * context - 64))
            prompt = max(16, context - count // 2)
            what = f"batch {batch}, context {context}"
            if not _decodes_fit(session, "decode", what, batch, prompt + count + 64):
                continue
            prefill = batch * prompt / _CHUNK_TOKENS_PER_SECOND
            longest = 1.5 * plan.seconds_per_point
            if not session.has_time("decode", what, prefill + longest + plan.settle_seconds):
                continue
            session.runner.start_decodes(batch, prompt)
            _run_steps(session.runner, 8, plan.settle_seconds)
            settings = {"batch": batch, "context_tokens": context}
            point, _, _ = session.measure(
                "decode", settings, _repeater(session.runner, count, longest)
            )
            guess = point.step_seconds or guess
    session.runner.clear()


def prefill(session: Session) -> None:
    """Prefill chunks of one size behind a context of one size, back to back."""
    plan = session.plan
    for context in plan.contexts_tokens:
        for chunk in plan.chunks_tokens:
            what = f"chunk {chunk} after {context}"
            if context + chunk > session.runner.kv_tokens // 2:
                session.skip("prefill", f"{what}: the KV cache is too small")
                continue
            if not session.has_time("prefill", what, plan.seconds_per_point + 3.0):
                continue
            rate = _chunk_rate(session)
            seconds = max(_FIRST_GUESS_SECONDS, chunk / rate)
            settle = max(1, int(plan.settle_seconds / seconds))
            # More than are needed: what is left over is dropped.
            count = settle + max(3, int(1.5 * plan.seconds_per_point / seconds))
            session.runner.start_chunks(context, chunk, count)
            _run_steps(session.runner, settle, plan.settle_seconds)
            settings = {"chunk_tokens": chunk, "context_tokens": context}
            session.measure(
                "prefill", settings, _repeater(session.runner, count, plan.seconds_per_point)
            )
            session.runner.clear()


def _chunk_rate(session: Session) -> float:
    """Tokens per second of the chunks so far, at the best."""
    rates = [
        point.tokens / point.seconds
        for point in session.points
        if point.stage == "prefill" and point.tokens
    ]
    return max([_CHUNK_TOKENS_PER_SECOND, *rates])


def _decodes_fit(session: Session, stage: str, what: str, batch: int, tokens: int) -> bool:
    needed = batch * tokens
    if needed <= session.runner.kv_tokens:
        return True
    have = session.runner.kv_tokens
    session.skip(stage, f"{what}: {needed} tokens, and the KV cache holds {have}")
    return False


def _run_steps(runner: Runner, count: int, most_seconds: float) -> int:
    """Up to `count` steps back to back, none started after `most_seconds`."""
    end = time.monotonic() + most_seconds
    done = 0
    while done < count and time.monotonic() < end and runner.step():
        done += 1
    return done


def _repeater(runner: Runner, count: int, most_seconds: float) -> Callable[[], int]:
    return lambda: _run_steps(runner, count, most_seconds)


def _paced(runner: Runner, period_seconds: float, count: int) -> None:
    """`count` steps, one at each tick; a step that is late shifts the ticks behind it."""
    due = time.monotonic()
    for _ in range(count):
        sleep_until(due)
        if not runner.step():
            raise ShaperError("the requests of a cadence ended before their time")
        runner.drain()
        due = max(due + period_seconds, time.monotonic())
    sleep_until(due)


def _pacer(runner: Runner, period_seconds: float, count: int) -> Callable[[], None]:
    return lambda: _paced(runner, period_seconds, count)
