"""The stages that step an engine by hand.

Each point starts from a fresh load, lets it settle, and is measured between two times at which
no step is under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.studies.gpu.engine import EngineRunner
from bench.studies.gpu.session import Session
from shaper.core.types import ClockEventReasons, GpuSample
from shaper.emulator.host import sleep_until
from shaper.errors import ShaperError

# What a first decode step is taken to last; later points go by those before.
_FIRST_GUESS_SECONDS = 0.007
_FEWEST_STEPS = 16
# Of the prompts that decodes need first; a slow GPU's.
_PROMPT_TOKENS_PER_SECOND = 30_000.0
# What a point takes beside its own time: prompts, prefixes, settling.
_SLACK_SECONDS = 3.0
# No GPU of today computes a model of 8B faster, and no step of it is shorter.
_CHUNK_TOKENS_PER_SECOND = 75_000.0
_SHORTEST_STEP_SECONDS = 0.004
# Rest over load of a wave. With 1 a wave of 50 ms would keep step with a meter that is
# refreshed every 100 ms, and show it one phase of the wave only.
_REST_RATIO = 1.13


def gap(session: Session) -> None:
    """Decode steps at a fixed period, cold and hot: what the GPU draws between them."""
    plan = session.plan
    _idle(session, "cold")
    _cadences(session, "cold", 0.0)
    if session.has_time("heating", plan.heat_seconds + _SLACK_SECONDS):
        _heat(session, plan.heat_seconds, "heating")
        _cadences(session, "hot", plan.heat_seconds / 15.0)
    _idle(session, "hot")


def _idle(session: Session, when: str) -> None:
    seconds = session.plan.idle_seconds
    session.runner.clear()
    if session.has_time(f"idle, {when}", seconds):
        session.measure({}, lambda: time.sleep(seconds), f"idle, {when}")


def _heat(session: Session, seconds: float, when: str = "") -> None:
    """The heaviest load there is; a point only where it has a name."""
    chunk = session.plan.cap_chunk_tokens
    _chunks(session.runner, min(session.plan.contexts_tokens), chunk, seconds)
    if when:
        session.measure({}, lambda: run_steps(session.runner, seconds), when)
    else:
        run_steps(session.runner, seconds)
    session.runner.clear()


def _cadences(session: Session, when: str, heat_seconds: float) -> None:
    plan, runner = session.plan, session.runner
    for batch in plan.cadence_batches:
        for period in plan.cadence_seconds:
            count = max(_FEWEST_STEPS, int(plan.seconds_per_point / period))
            prompt = max(16, plan.cadence_context_tokens - count // 2)
            what = f"{when}, batch {batch} every {period * 1e3:g} ms"
            if not session.has_cache(what, batch * (prompt + count)):
                continue
            if not session.has_time(what, heat_seconds + count * period + _SLACK_SECONDS):
                continue
            if heat_seconds:
                _heat(session, heat_seconds)
            runner.start_decodes(batch, prompt)
            _paced(runner, period, max(4, int(plan.settle_seconds / period)))
            settings = {"batch": batch, "cadence_seconds": period}
            session.measure(settings, lambda p=period, c=count: _paced(runner, p, c), when)  # type: ignore[misc]
    runner.clear()


def decode(session: Session) -> None:
    """Decode steps back to back."""
    plan, runner = session.plan, session.runner
    longest = 1.5 * plan.seconds_per_point
    for context in plan.contexts_tokens:
        guess = _FIRST_GUESS_SECONDS
        for batch in plan.decode_batches:
            count = int(plan.seconds_per_point / guess)
            count = max(_FEWEST_STEPS, min(count, 2 * context - 64))
            prompt = max(16, context - count // 2)
            what = f"batch {batch}, context {context}"
            if not session.has_cache(what, batch * (prompt + count + 64)):
                continue
            prefill = batch * prompt / _PROMPT_TOKENS_PER_SECOND
            if not session.has_time(what, prefill + longest + plan.settle_seconds):
                continue
            runner.start_decodes(batch, prompt)
            run_steps(runner, plan.settle_seconds, 8)
            settings = {"batch": batch, "context_tokens": context}
            point, _ = session.measure(
                settings,
                lambda c=count: run_steps(runner, longest, c),  # type: ignore[misc]
            )
            guess = point.step_seconds or guess
    runner.clear()


def prefill(session: Session) -> None:
    """Prefill chunks of one size behind a context of one size, back to back."""
    plan, runner = session.plan, session.runner
    for context in plan.contexts_tokens:
        for chunk in plan.chunks_tokens:
            what = f"chunk {chunk} after {context}"
            if not session.has_cache(what, 2 * (context + chunk)):
                continue
            if not session.has_time(what, plan.seconds_per_point + _SLACK_SECONDS):
                continue
            _chunks(runner, context, chunk, plan.seconds_per_point + plan.settle_seconds)
            run_steps(runner, plan.settle_seconds)
            settings = {"chunk_tokens": chunk, "context_tokens": context}
            session.measure(settings, lambda: run_steps(runner, plan.seconds_per_point))
            runner.clear()


def cap(session: Session) -> None:
    """Square waves of load, then the heaviest load from rest; nothing of the GPU is set."""
    plan, runner = session.plan, session.runner
    context = min(plan.contexts_tokens)
    for on in plan.wave_seconds:
        cycles = max(2, round(plan.wave_total_seconds / ((1.0 + _REST_RATIO) * on)))
        seconds = (1.0 + _REST_RATIO) * on * cycles
        if not session.has_time(f"waves of {on:g} s", seconds + _SLACK_SECONDS):
            continue
        _chunks(runner, context, plan.wave_chunk_tokens, on * cycles)
        time.sleep(plan.settle_seconds)
        session.measure(
            {"on_seconds": on},
            lambda on=on, cycles=cycles: _waves(runner, on, cycles),  # type: ignore[misc]
        )
    seconds = 2.0 * plan.seconds_per_point
    if session.has_time("the step from rest", seconds + _SLACK_SECONDS):
        _chunks(runner, context, plan.cap_chunk_tokens, seconds)
        time.sleep(min(1.0, plan.seconds_per_point))
        settings = {"chunk_tokens": plan.cap_chunk_tokens, "context_tokens": context}
        _, samples = session.measure(
            settings, lambda: run_steps(runner, seconds), "a step from rest"
        )
        session.findings["power_cap"] = describe_cap(samples)
    runner.clear()


def _waves(runner: EngineRunner, on_seconds: float, cycles: int) -> None:
    begin = time.monotonic()
    period = (1.0 + _REST_RATIO) * on_seconds
    for cycle in range(cycles):
        rise = begin + period * cycle
        sleep_until(rise)
        run_steps(runner, rise + on_seconds - time.monotonic())
        runner.drain()
    sleep_until(begin + period * cycles)


def describe_cap(samples: Sequence[GpuSample]) -> dict[str, Any]:
    """When after the first sample the cap set in, and where power and clock went."""
    limits = [s.enforced_limit_watts for s in samples if s.enforced_limit_watts]
    capped = [s for s in samples if s.clock_event_reasons & ClockEventReasons.SW_POWER_CAP]
    instant = [s.instant_watts for s in samples if s.instant_watts is not None]
    clocks = [s.sm_clock_hertz for s in samples if s.sm_clock_hertz is not None]
    late = clocks[len(clocks) // 2 :]
    found: dict[str, Any] = {
        "enforced_limit_watts": limits[-1] if limits else None,
        "capped_ratio": len(capped) / len(samples) if samples else None,
        "first_capped_seconds": capped[0].read_seconds - samples[0].read_seconds
        if capped
        else None,
        "highest_instant_watts": max(instant) if instant else None,
        "first_sm_clock_hertz": clocks[0] if clocks else None,
        "lowest_sm_clock_hertz": min(clocks) if clocks else None,
        "settled_sm_clock_hertz": float(np.mean(late)) if late else None,
    }
    return found


STAGES: dict[str, Callable[[Session], None]] = {
    "gap": gap,
    "decode": decode,
    "prefill": prefill,
    "cap": cap,
}


def _chunks(runner: EngineRunner, context_tokens: int, chunk_tokens: int, seconds: float) -> None:
    """Queues chunks for at least so many seconds; what is left over must be cleared."""
    each = max(_SHORTEST_STEP_SECONDS, chunk_tokens / _CHUNK_TOKENS_PER_SECOND)
    runner.start_chunks(context_tokens, chunk_tokens, 4 + int(seconds / each))


def run_steps(runner: EngineRunner, most_seconds: float, count: int = 1_000_000) -> int:
    """Up to `count` steps back to back, none started after `most_seconds`; how many ran."""
    end = time.monotonic() + most_seconds
    done = 0
    while done < count and time.monotonic() < end and runner.step():
        done += 1
    return done


def _paced(runner: EngineRunner, period_seconds: float, count: int) -> None:
    """`count` steps, one at each tick; a step that is late shifts the ticks behind it.

    Raises:
        ShaperError: the requests ended before.
    """
    due = time.monotonic()
    for _ in range(count):
        sleep_until(due)
        if not runner.step():
            raise ShaperError("the requests of a cadence ended before their time")
        runner.drain()
        due = max(due + period_seconds, time.monotonic())
    sleep_until(due)
