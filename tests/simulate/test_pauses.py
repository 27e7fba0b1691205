"""What virtual time leaves out of vLLM's polls changes nothing."""

from __future__ import annotations

import random

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from shaper.core.types import Decision, PowerLimit, Reason
from shaper.engine.scheduler import ShapedAsyncScheduler, ShapedScheduler
from shaper.simulate import pauses
from shaper.simulate.build import new_engine
from shaper.simulate.engine import VirtualEngine, engine_config, new_request


class Log:
    """Keeps what was decided."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        self.decisions.append(decision)


def _served(asynchronous: bool) -> tuple[VirtualEngine, list[Decision]]:
    """An engine whose limit makes most polls pauses; requests come, and one is aborted."""
    config = engine_config("llama-3.1-8b", "h200-sxm", async_scheduling=asynchronous)
    log, chance = Log(), random.Random(7)
    limits = (PowerLimit(330.0, 0.1),)
    engine = new_engine(config, "h200-sxm", limits, itl_target_seconds=0.1, log=log)
    for number in range(24):
        prompt = [chance.randrange(1000) for _ in range(chance.randrange(20, 1500))]
        engine.add(new_request(f"r{number}", prompt, chance.randrange(1, 30), config))
        engine.run_until(engine.now_seconds + chance.uniform(0.0, 0.1))
        if number == 12:
            from vllm.v1.request import RequestStatus

            engine.scheduler.finish_requests("r12", RequestStatus.FINISHED_ABORTED)
    engine.run_until(10.0)
    return engine, log.decisions


@pytest.mark.parametrize("asynchronous", [True, False])
def test_polls_that_vllm_does_not_hear_of_change_nothing(asynchronous, monkeypatch):
    """Every decision and every token's time is that of a scheduler which hears all polls."""
    quick, decisions = _served(asynchronous)
    heard = quick.scheduler.current_step
    monkeypatch.setattr(pauses, "VirtualAsyncScheduler", ShapedAsyncScheduler)
    monkeypatch.setattr(pauses, "VirtualScheduler", ShapedScheduler)
    whole, all_decisions = _served(asynchronous)
    assert decisions == all_decisions
    assert quick.requests == whole.requests
    assert heard == whole.scheduler.current_step
    waits = [each for each in decisions if each.reason in (Reason.PAUSE, Reason.DECODE_PACING)]
    assert len(waits) > 200
    assert sum(each.finished_seconds is not None for each in quick.requests.values()) == 23


def test_most_polls_of_a_pause_are_not_heard(monkeypatch):
    """Else it is of no use."""
    calls = 0
    own = AsyncScheduler.schedule

    def schedule(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return own(self, *args, **kwargs)

    monkeypatch.setattr(AsyncScheduler, "schedule", schedule)
    _, decisions = _served(True)
    pauses_count = sum(not each.limits.run for each in decisions)
    steps = len(decisions) - pauses_count
    assert calls < steps + pauses_count / 3
