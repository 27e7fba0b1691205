"""When nothing binds, or nothing is applied, vLLM schedules exactly as it would alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from shaper.core.policy import Plan
from shaper.core.types import PowerLimit, Reason, StepLimits
from tests.engine.harness import random_traffic

LOOSE = (PowerLimit(5000.0, 0.1), PowerLimit(4000.0, 1.0))
TIGHT = (PowerLimit(420.0, 0.1),)
# Everything that a planner can be asked for, and nothing of it binds.
EVERYTHING = {
    "ramp_watts_per_second": 50_000.0,
    "itl_target_seconds": 5.0,
    "ttft_target_seconds": 60.0,
    "margin_ratio": 0.05,
}


def same_outputs(make_rig, traffic, limits, engine, shaper):
    """Serve the same with and without a shaper; the shaped rig."""
    theirs, ours = make_rig(None, **engine), make_rig(limits, **engine, **shaper)
    theirs.run(traffic)
    ours.run(traffic)
    assert len(theirs.outputs) > 200
    assert ours.outputs == theirs.outputs
    assert ours.shaper.counters.errors == 0
    return ours


@pytest.mark.parametrize("asynchronous", [True, False])
def test_outputs_equal_vllms(make_rig, asynchronous):
    """Without a limit every SchedulerOutput of random traffic is that of vLLM's own scheduler."""
    engine = {"asynchronous": asynchronous, "kv_blocks": 2500}
    ours = same_outputs(make_rig, random_traffic(2), (), engine, {})
    assert ours.shaper.counters.held == 0


@pytest.mark.parametrize(
    ("asynchronous", "v2_runner", "kv_blocks"),
    [(True, True, 50_000), (False, True, 900), (True, False, 900), (False, False, 50_000)],
)
def test_every_feature_at_once_changes_nothing(make_rig, asynchronous, v2_runner, kv_blocks):
    """Limits, a ramp, both targets and a margin that don't bind, whatever branch vLLM takes."""
    engine = {"asynchronous": asynchronous, "v2_runner": v2_runner, "kv_blocks": kv_blocks}
    traffic = random_traffic(7, rate=40.0)
    ours = same_outputs(make_rig, traffic, LOOSE, engine, EVERYTHING)
    assert {d.reason for d in ours.log.decisions} <= {Reason.UNCONSTRAINED, Reason.IDLE}
    preempted = any(output["preempted"] for output in ours.outputs)
    assert preempted == (kv_blocks == 900)
    # Prompts that share a prefix begin behind it.
    assert any(computed for output in ours.outputs for _, computed in output["new"])


class EveryLever:
    """Asks for each lever in turn, and for all at once."""

    def __init__(self) -> None:
        self.count = 0

    def plan(self, view):
        self.count += 1
        choices = (
            StepLimits(run=False),
            StepLimits(prefill_tokens=0),
            StepLimits(prefill_tokens=64),
            StepLimits(decode_requests=1),
            StepLimits(running_requests=1),
            StepLimits(prefill_tokens=64, decode_requests=2, running_requests=2),
        )
        return Plan(choices[self.count % len(choices)], Reason.PAUSE)


def test_a_shadow_holds_no_lever(make_rig):
    """In shadow every lever may be asked for, and none is pulled."""
    shaper = {"policy": EveryLever, "shadow": True}
    ours = same_outputs(make_rig, random_traffic(4), TIGHT, {"kv_blocks": 2500}, shaper)
    asked = {limits for limits in (d.limits for d in ours.log.decisions) if limits.binding}
    assert len(asked) >= 5
    assert not any(decision.applied for decision in ours.log.decisions)


@pytest.mark.parametrize(
    "shaper",
    [
        {"itl_target_seconds": 0.02, "ttft_target_seconds": 0.2, "ramp_watts_per_second": 200.0},
        {"itl_target_seconds": 0.05, "spend_slack": True},
    ],
    ids=["targets-and-ramp", "slack"],
)
def test_shadow_applies_nothing_and_still_decides(make_rig, shaper):
    """Under a tight budget a shadow leaves every output alone, and records what it would do."""
    ours = same_outputs(make_rig, random_traffic(4), TIGHT, {}, {**shaper, "shadow": True})
    would = [d for d in ours.log.decisions if d.limits.binding]
    assert len(would) > 20
    assert not any(decision.applied for decision in ours.log.decisions)


def test_a_budget_that_binds_does_change_the_outputs(make_rig):
    """The comparison above is able to fail."""
    theirs, ours = make_rig(None), make_rig(TIGHT)
    for rig in (theirs, ours):
        rig.run(random_traffic(4, count=20))
    assert ours.outputs != theirs.outputs


def decisions_digest() -> str:
    """Of all decisions of one run, for a process of its own."""
    from bench.acceptance.traffic import conversation
    from bench.harness.virtual import Setup, VirtualRun

    digest = hashlib.sha256()

    class Digesting:
        def add(self, decision, meter_watts):
            digest.update(repr((decision, meter_watts)).encode())

    run = VirtualRun(Setup(TIGHT, itl_seconds=0.05), 3)
    run.engine.scheduler.shaper._log = Digesting()
    run.replay(conversation(5.0, 10.0, 3), 8.0)
    return digest.hexdigest()


def test_a_decision_does_not_depend_on_the_order_of_sets():
    """A process whose strings hash differently decides the same."""
    script = "import runpy, sys; f = runpy.run_path(sys.argv[1]); print(f['decisions_digest']())"
    # Another version of vLLM may be on the path.
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), os.getcwd()]))
    done = subprocess.run(
        [sys.executable, "-c", script, __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == decisions_digest()
