"""The order of time: nobody sees the future."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shaper.simulate.rack import VirtualRack


@dataclass
class Scripted:
    """Does an event after each of its gaps; says when."""

    name: int
    gaps: list[float]
    log: list[tuple[float, int]]
    due_seconds: float = math.inf
    arrived: list[float] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return self.due_seconds < math.inf

    def arrive(self, request: object, at_seconds: float) -> None:
        self.arrived.append(at_seconds)
        if not self.busy:
            self.due_seconds = at_seconds

    def next_event(self) -> None:
        self.log.append((self.due_seconds, self.name))
        self.due_seconds = self.due_seconds + self.gaps.pop() if self.gaps else math.inf


scripts = st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), max_size=6), min_size=1)
arrivals = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(scripts=scripts, arrivals=arrivals)
def test_what_is_due_first_happens_first(scripts, arrivals):
    """Events go up in time over all engines, whoever has them, and none is left out."""
    log: list[tuple[float, int]] = []
    engines = [Scripted(k, list(gaps), log) for k, gaps in enumerate(scripts)]
    rack = VirtualRack(engines)  # type: ignore[arg-type]
    for at, index in sorted(arrivals):
        rack.run_until(at)
        # What is due at the arrival's own time has not happened.
        assert all(when < at for when, _ in log)
        rack.arrive(index % len(engines), object(), at)
    rack.run_until(1e9)
    assert [when for when, _ in log] == sorted(when for when, _ in log)
    assert not any(engine.busy for engine in engines)
    assert rack.events == len(log)


def test_ties_go_by_the_engines_order():
    """Of two events at one time the lower index goes first: a run has one course."""
    log: list[tuple[float, int]] = []
    engines = [Scripted(k, [1.0, 1.0], log) for k in range(3)]
    rack = VirtualRack(engines)  # type: ignore[arg-type]
    for index in (2, 0, 1):
        rack.arrive(index, object(), 0.5)
    rack.run_until(10.0)
    assert log == [(t, k) for t in (0.5, 1.5, 2.5) for k in range(3)]


def test_what_is_due_at_the_end_is_left():
    """A run up to a time leaves out what is due then, and can go on."""
    log: list[tuple[float, int]] = []
    rack = VirtualRack([Scripted(0, [1.0], log)])  # type: ignore[list-item]
    rack.arrive(0, object(), 0.0)
    rack.run_until(1.0)
    assert log == [(0.0, 0)]
    rack.run_until(1.5)
    assert log == [(0.0, 0), (1.0, 0)]


def test_an_arrival_in_the_past_is_refused():
    """It would change what has happened."""
    rack = VirtualRack([Scripted(0, [], [])])  # type: ignore[list-item]
    rack.run_until(2.0)
    with pytest.raises(ValueError, match="arrival at"):
        rack.arrive(0, object(), 1.0)
