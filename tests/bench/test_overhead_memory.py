"""The shaper's memory over many steps of a stub, and that the measure sees what grows."""

from __future__ import annotations

import gc
import sys
from contextlib import closing
from typing import Any

import pytest

from bench.harness.memory import CHECKPOINTS, SyntheticEngine, grown, held_bytes, measure
from shaper.engine.runtime import LiveShaper
from tests.bench.test_overhead import run

STEPS = 40_000
# The smallest thing kept by step or by request is a block: 20,000 steps, 2,700 requests.
MOST_BLOCKS = 1500
MOST_BYTES = 100_000


@pytest.fixture(scope="module")
def memories():
    """Of one run."""
    return list(measure(STEPS))


def test_memory_stays_the_same(memories):
    """The second half of a run holds no more than the first."""
    held, blocks = grown(memories)
    assert held < MOST_BYTES
    assert blocks < MOST_BLOCKS


def test_the_run_stirs_what_could_grow(memories):
    """Requests come and go, the controller fails and comes back, and no count goes wrong."""
    assert memories[-1].steps >= STEPS
    assert memories[-1].requests > 4000
    assert memories[-1].failures == STEPS // 10_000 - 1
    assert [round(one.steps / STEPS, 2) for one in memories] == list(CHECKPOINTS)


@pytest.fixture
def engine():
    """A fresh one."""
    with closing(SyntheticEngine()) as made:
        yield made


def test_every_lever_is_pulled_in_it(engine):
    """Steps are held, cut and free, under every phase's budget."""
    engine.run(6000)
    counted = {reason.value for reason, n in engine.shaper.counters.decisions.items() if n}
    assert counted >= {"unconstrained", "chunk_power", "decode_pacing", "pause"}
    assert engine.shaper._tally.mismatches == 0


@pytest.mark.parametrize("kept", ["step", "request"])
def test_a_leak_is_seen(engine, monkeypatch: pytest.MonkeyPatch, kept: str):
    """One value kept by step, or by request, is over what the test above allows."""
    leak: list[Any] = []
    seen: set[str] = set()
    record = LiveShaper._record

    def leaking(self: LiveShaper, output: Any) -> None:
        record(self, output)
        new = output.num_scheduled_tokens.keys() - seen
        seen.update(new)
        for _ in new if kept == "request" else output.num_scheduled_tokens and [0]:
            leak.append(float(len(leak)) + 0.5)
        self.leak = leak  # type: ignore[attr-defined]

    monkeypatch.setattr(LiveShaper, "_record", leaking)
    engine.run(5000)
    gc.collect()
    blocks, held, count = sys.getallocatedblocks(), held_bytes(engine), len(leak)
    engine.run(10_000)
    gc.collect()
    # The second half of the run above has four times as many steps.
    assert 4 * (sys.getallocatedblocks() - blocks) > MOST_BLOCKS
    assert held_bytes(engine) - held >= 24 * (len(leak) - count) - MOST_BYTES
    assert len(leak) - count > 500


def test_the_command_prints_what_it_finds():
    """A row for each checkpoint, and what the second half added."""
    done = run("--memory", "--steps", "2000")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n| ") == 1 + len(CHECKPOINTS)
    assert "from half of the steps to their end" in done.stdout
