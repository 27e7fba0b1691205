"""No interleaving of looks, claims, entries, joins, crashes and stops goes over a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shaper.core.ledger.shared import Committed, EngineShare, Step
from shaper.core.types import PowerLimit, StepPrediction
from shaper.group.ledger import GroupLedger
from shaper.group.lock import ClaimLock
from shaper.group.reservations import AHEAD_SECONDS, Reservations, table_bytes
from tests.group.group_judge import Device, Drawn, Run, excess_joules
from tests.strategies import examples

CAPACITY = 5
REST_AFTER_SECONDS = 0.3
MOST_WATTS = 2000.0
LIMITS = {
    "short": (PowerLimit(1300.0, 0.02), PowerLimit(1100.0, 0.1)),
    "usual": (PowerLimit(1200.0, 0.1), PowerLimit(1000.0, 1.0)),
    "second": (PowerLimit(1000.0, 1.0),),
    "long": (PowerLimit(900.0, 5.0), PowerLimit(1500.0, 1.0)),
}
# Steps are longer where only long windows bind, so that some dozen fill them.
STRETCH = {"short": 1.0, "usual": 1.0, "second": 5.0, "long": 20.0}


class Interrupted(Reservations):
    """Reservations on which others act right after an entry, before its engine has checked it."""

    def __init__(self, limits: tuple[PowerLimit, ...]) -> None:
        super().__init__(bytearray(table_bytes(CAPACITY, limits)), CAPACITY, limits)
        self.then: list[Callable[[int], None]] = []

    def commit(self, row: int, committed: Committed, share: EngineShare, now: float) -> None:
        super().commit(row, committed, share, now)
        if self.then:
            self.then.pop()(row)


class FakeGate:
    """A lock that can be had, or can't, and a holder that was stopped, or wasn't."""

    waited_seconds = 0.0

    def __init__(self) -> None:
        self.free, self.stopped = True, False

    def enter(self) -> bool:
        return self.free

    def late(self) -> bool:
        return self.stopped

    def leave(self) -> None:
        pass


class Engine:
    """One engine that asks before it runs."""

    def __init__(
        self, rows: Reservations, row: int, limits: tuple[PowerLimit, ...], drawn: Drawn
    ) -> None:
        self.row, self.device = row, Device(drawn)
        self.gate = FakeGate()
        self.group = GroupLedger(rows, row, limits, cast(ClaimLock, self.gate))
        self.share = EngineShare(drawn.idle_watts)
        self.asked: tuple[Run, float] | None = None

    def ask(self, now: float, seconds: float, watts: float, floor_watts: float) -> None:
        """Look, and decide on a step that fits.

        An engine that queues two steps never asks further ahead than rows are exact.
        """
        idle = self.device.drawn.idle_watts
        self.share = EngineShare(idle + floor_watts)
        start = self.device.free_seconds(now)
        view = self.group.query(start, now, self.share)
        fits = min(watts, *(part.max_watts(seconds) for part in view.parts))
        near = start + seconds <= now + AHEAD_SECONDS
        self.asked = ((start, start + seconds, fits), now) if near and fits > idle else None

    def reserve(self, now: float) -> None:
        """Claim what was decided on, unless its time has passed."""
        if self.asked is None:
            return
        run, _ = self.asked
        self.asked = None
        start, end, watts = run
        if start < now or start != self.device.free_seconds(now):
            return
        step = Step(start, StepPrediction(end - start, watts * (end - start)))
        if self.group.reserve(self.device.committed([run]), self.share, now, step):
            self.device.launch(run)
            note(f"{self.row} runs {run}")


class Interleavings(RuleBasedStateMachine):
    """Several engines, by turns and in the middle of each other."""

    aligned: bool = False
    """Whether times are whole milliseconds, so that the bins of 1 ms are exact."""

    @initialize(kind=st.sampled_from(sorted(LIMITS)))
    def begin(self, kind: str) -> None:
        kind = "short" if self.aligned else kind
        self.limits, self.stretch = LIMITS[kind], STRETCH[kind]
        self.rows = Interrupted(self.limits)
        self.now = 1000.0
        self.engines: dict[int, Engine] = {}
        self.all: list[Drawn] = []
        self.last_of: dict[int, Drawn] = {}
        self.join_now(100.0)
        self.join_now(100.0)

    def seconds(self, seconds: float) -> float:
        return round(seconds, 3) if self.aligned else seconds

    def join_now(self, idle_watts: float) -> None:
        used = self.rows.table["used"]
        row = int(used.argmin())
        idle = float(self.rows.table["idle_watts"][used == 1].sum()) + idle_watts
        if used[row] or idle >= 0.8 * min(limit.watts for limit in self.limits):
            return
        rest = 0.8 * idle_watts
        # What others had committed before it came knows nothing of its idle power, and may
        # have filled the windows that it lies in.
        longest = max(limit.window_seconds for limit in self.limits)
        latest = max((e.device.free_seconds(self.now) for e in self.engines.values()), default=0.0)
        ends = [stop for drawn in self.all for _, stop, _ in drawn.runs]
        counted = max([self.now, latest, *ends]) + longest
        drawn = Drawn(idle_watts, rest, REST_AFTER_SECONDS, self.now, counted)
        self.all.append(drawn)
        self.last_of[row] = drawn
        self.rows.open(row, idle_watts, rest, REST_AFTER_SECONDS, self.now)
        self.engines[row] = Engine(self.rows, row, self.limits, drawn)

    def claim_inside(self, engine: Engine, entering: int) -> None:
        if self.engines.get(engine.row) is engine and engine.row != entering:
            engine.reserve(self.now)

    def some(self, data: st.DataObject, what: str) -> Engine:
        return self.engines[data.draw(st.sampled_from(sorted(self.engines)), label=what)]

    @rule(milliseconds=st.sampled_from([0.3, 1, 2, 5, 5, 10, 10, 20, 50, 200, 6000]))
    def time_passes(self, milliseconds: float) -> None:
        self.now = self.seconds(self.now + max(milliseconds, self.aligned) / 1000)

    @precondition(lambda self: self.engines)
    @rule(
        data=st.data(),
        milliseconds=st.floats(1.0, 60.0),
        watts=st.sampled_from([400.0, 900.0, MOST_WATTS]),
        floor_watts=st.sampled_from([0.0, 0.0, 60.0]),
        when=st.sampled_from(["now", "now", "inside", "later"]),
        free=st.booleans(),
    )
    def query(
        self,
        data: st.DataObject,
        milliseconds: float,
        watts: float,
        floor_watts: float,
        when: str,
        free: bool,
    ) -> None:
        """One looks, and claims at once, in the middle of the next one's claim, or later."""
        engine = self.some(data, "looks")
        engine.gate.free = free
        seconds = self.seconds(self.stretch * milliseconds / 1000)
        engine.ask(self.now, seconds, watts, floor_watts)
        if when == "now":
            engine.reserve(self.now)
        elif when == "inside":
            self.rows.then.append(lambda entering: self.claim_inside(engine, entering))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), stopped=st.sampled_from([False, False, False, True]))
    def reserve(self, data: st.DataObject, stopped: bool) -> None:
        engine = self.some(data, "claims")
        engine.gate.stopped = stopped
        engine.reserve(self.now)
        engine.gate.stopped = False

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), early=st.booleans())
    def finish(self, data: st.DataObject, early: bool) -> None:
        """The oldest run is over: now, before its time, or some time ago."""
        engine = self.some(data, "finishes")
        device = engine.device
        if device.flying and device.flying[0][0] < self.now:
            over = device.flying[0][1] <= self.now
            if over or early:
                device.finish(self.now)
                engine.group.commit(device.committed(), engine.share, self.now)

    @rule(idle_watts=st.sampled_from([60.0, 140.0]))
    def join(self, idle_watts: float) -> None:
        self.join_now(idle_watts)

    @precondition(lambda self: len(self.engines) > 1)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """Its runs in flight go on; nobody enters anything for it any more."""
        row = self.some(data, "dies").row
        del self.engines[row]
        drawn = self.last_of[row]
        # The idle power of a GPU without an engine is not the group's.
        drawn.until_seconds = max(self.now, self.rows.end_seconds(row))

    @rule()
    def reap(self) -> None:
        """A dead one's row is freed when its last run has left the longest window."""
        longest = max(limit.window_seconds for limit in self.limits)
        for row in range(CAPACITY):
            gone = self.rows.table["used"][row] and row not in self.engines
            if gone and self.now >= self.last_of[row].until_seconds + longest:
                self.rows.table["used"][row] = 0

    def teardown(self) -> None:
        if not hasattr(self, "limits"):
            return
        for limit in self.limits:
            bins = 0.001 if limit.window_seconds <= 0.5 else 0.004
            bins = bins if limit.window_seconds <= 4.0 else 0.04
            jumps = (MOST_WATTS - 48.0) * CAPACITY
            allowed = 1e-6 if self.aligned else jumps * bins / 2
            excess = excess_joules(self.all, limit, self.now + 10.0)
            assert excess <= allowed, (limit, excess, allowed)


class AlignedInterleavings(Interleavings):
    """The same in whole milliseconds, judged to a microjoule."""

    aligned = True


TestInterleavings = Interleavings.TestCase
TestAlignedInterleavings = AlignedInterleavings.TestCase
TestInterleavings.settings = TestAlignedInterleavings.settings = examples(40, steps=60)
