"""A tick beside the steps: whatever fails in it costs itself alone, is counted, and is named."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.core.budget import Constraints
from shaper.core.supervise.admission import Admission
from shaper.core.supervise.status import EngineStatus
from shaper.core.supervise.supervisor import Supervisor
from shaper.core.types import GpuIdentity, GpuSample, PowerBudget, PowerLimit
from shaper.doctor.server import metric_findings, samples
from shaper.engine.control import BudgetControl
from shaper.engine.decision_log import DecisionLog
from shaper.engine.membership import Membership
from shaper.engine.readers import NoSensor
from shaper.engine.recorder import Recorder
from shaper.engine.tick import EngineTick, Live
from shaper.gpu.parts import PARTS, Parts
from shaper.gpu.profiles import load_profile
from shaper.gpu.sampler import Sampler
from shaper.ipc.engine_record import SchedulerCounters
from shaper.ipc.flex import FlexQueue
from shaper.ipc.status_block import StatusWriter
from tests.controlled import engine as budget_control
from tests.controlled import record, run
from tests.engine.test_membership import FakeHandle
from tests.scraping import scrape_text

__all__ = ["run"]

TICK_SECONDS = 0.02
LABEL = (("engine", "0"),)


class Gpu:
    """One GPU that draws 400 W."""

    gpus = (GpuIdentity(0, "NVIDIA H200", "GPU-0"),)

    now_seconds = 0.0

    def read(self) -> tuple[GpuSample, ...]:
        now = self.now_seconds
        return (GpuSample(now, 0, 400.0 + now % 0.7, 400.0, 400.0 * now, 700.0, 1.9e9),)

    def close(self) -> None:
        """Nothing is held."""


class Shaper:
    """A shaper as the tick sees it."""

    def __init__(self) -> None:
        self.counters = SchedulerCounters()
        self.constraints = Constraints(PowerBudget((PowerLimit(560.0, 1.0),)))
        self.demand, self.mode = None, "on"
        self.standing: EngineStatus | None = None
        self.extra: tuple[PowerLimit, ...] = ()

    def set_budget(self, budget: PowerBudget) -> None:
        self.constraints = replace(self.constraints, budget=budget)

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def set_extra_limits(self, limits: tuple[PowerLimit, ...]) -> None:
        self.extra = limits

    def renew_cap(self) -> None:
        """No cap here."""


@dataclass
class Engine:
    """What ticks in one engine, wired as at the start of one."""

    gpu: Any
    sampler: Sampler
    shaper: Shaper
    control: BudgetControl
    status: StatusWriter
    tick: EngineTick
    supervisor: Supervisor
    recorder: Recorder
    handle: FakeHandle
    member: Membership
    admission: Admission
    parts: Parts
    log: DecisionLog
    run: str

    def ticks(self, count: int = 30) -> list[Any]:
        """Tick; what `latest` was after each."""
        seen = []
        for _ in range(count):
            self.gpu.now_seconds += TICK_SECONDS
            self.sampler.tick()
            seen.append(self.sampler.latest)
        return seen


@pytest.fixture
def engine(run: str, tmp_path: Path) -> Iterator[Engine]:
    with wired(run, tmp_path, Gpu()) as made:
        yield made


@contextmanager
def wired(run: str, tmp_path: Path, gpu: Any) -> Iterator[Engine]:
    """An engine of this GPU, which tells the time."""
    gpu.now_seconds = time.monotonic()
    shaper, parts, handle = Shaper(), Parts(), FakeHandle()
    control = budget_control(run, now_seconds=gpu.now_seconds)
    status, log = StatusWriter(run, 0, {}), DecisionLog(str(tmp_path / "decisions"))
    admission = Admission(None, gpu.now_seconds)
    supervisor = Supervisor(
        load_profile("h200-sxm"),
        gpu.gpus,
        admission=admission,
        metered=bool(gpu.gpus),
        parts=parts,
    )
    recorder = Recorder(tmp_path, 0, {}, str(tmp_path / "run.csv"), parts)
    member = Membership(handle, 700.0, clock=lambda: gpu.now_seconds)  # type: ignore[arg-type]
    sampler = Sampler(
        gpu,
        lambda: gpu.now_seconds,
        on_samples=recorder.add_samples,
        on_state=lambda _: None,
        parts=parts,
    )
    flex = FlexQueue(2, None, None, 9, (5, 1, 0, 1), 3)
    sampler.on_tick = tick = EngineTick(
        parts, shaper, sampler, supervisor, 115.0, lambda: flex,  # type: ignore[arg-type]
        lambda constraints: constraints.budgeted, Live(control, status, log, recorder, member),
    )  # fmt: skip
    yield Engine(
        gpu, sampler, shaper, control, status, tick, supervisor, recorder, handle, member,
        admission, parts, log, run,
    )  # fmt: skip
    status.close()
    recorder.close()
    log.close()


# Where it fails, and whose failure that is.
SEAMS = {
    "sampler._on_state": "states",
    "sampler._note_limits": "limit_changes",
    "sampler.report": "sensor_report",
    "control.tick": "control",
    "control._log": "control",
    "control._follower.poll": "control",
    "member.tick": "group",
    "supervisor._health.observe": "health",
    "supervisor._thermal.observe": "thermal",
    "admission.update": "admission",
    "supervisor.tick": "supervisor",
    "shaper.set_extra_limits": "supervisor",
    "tick._windows.observe": "meter_windows",
    "tick._shapes_heat": "supervisor",
    "tick._flex": "flex",
    "status.write": "status_block",
    "log.drain": "decision_log",
    "recorder.follow": "recording",
    "recorder._job.add_samples": "recording",
}
# What the failure itself takes away.
NOT_SHOWN = {"status.write"}
NOT_FOLLOWED = {"control.tick", "control._follower.poll"}


@pytest.mark.parametrize("seam", SEAMS)
def test_a_part_that_fails_costs_itself_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seam: str
) -> None:
    """Power states, control and the other parts go on; it is counted, shown, named, said once."""
    engine.ticks(60)
    *path, name = seam.split(".")
    owner: Any = engine
    for step in path:
        owner = getattr(owner, step)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(owner, name, broken)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        engine.control._follower._file.write(record(engine.run, 1, 400.0))
        before = len(engine.handle.asked)
        states = engine.ticks(60)
    times = [state.sampled_seconds for state in states]
    assert times == sorted(set(times)), "each reading is published"
    part = SEAMS[seam]
    assert engine.parts.errors[part] >= 1  # type: ignore[index]
    assert [name for name in PARTS if engine.parts.errors[name]] == [part]
    said = [r.message for r in caplog.records if "a mistake" in r.message]
    assert len(said) == 1
    if seam not in NOT_FOLLOWED:
        assert engine.shaper.constraints.budget.limits == (PowerLimit(400.0, 1.0),)
    if part != "group":
        assert len(engine.handle.asked) >= before + 60
    monkeypatch.undo()
    engine.ticks(1)
    text = scrape_text(engine.run)
    found = {(s.name, *s.labels.values()): s.value for s in samples(text)}
    assert found["shaper_part_errors_total", "0", part] == engine.parts.errors[part]  # type: ignore[index]
    (well,) = (f for f in metric_findings(samples(text + INFO)) if f.check == "server.counters")
    assert well.status.value == "warn"
    assert part in well.found


INFO = '\nshaper_info{engine="0",version="1",gpu="h200-sxm",model="m"} 1.0\n'


@pytest.mark.parametrize("seam", sorted(set(SEAMS) - NOT_SHOWN))
def test_the_rest_is_shown_while_a_part_fails(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, seam: str
) -> None:
    """Metrics of this tick, and the failure among them, while the part still fails."""
    *path, name = seam.split(".")
    owner: Any = engine
    for step in path:
        owner = getattr(owner, step)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a mistake")

    engine.ticks(60)
    monkeypatch.setattr(owner, name, broken)
    engine.control._follower._file.write(record(engine.run, 1, 400.0))
    engine.ticks(60)
    found = {(s.name, *s.labels.values()): s.value for s in samples(scrape_text(engine.run))}
    assert found["shaper_power_average_watts", "0"] == 400.0
    assert found["shaper_heartbeat_age_seconds", "0"] == 0.0  # our clock runs ahead
    assert found["shaper_part_errors_total", "0", SEAMS[seam]] >= 1


def test_a_record_that_is_too_long_leaves_the_one_before(engine: Engine) -> None:
    """Half an update would hide the engine from every reader."""
    engine.ticks(2)
    with pytest.raises(ValueError, match="a record of 100000 bytes in a block of 32768"):
        engine.status.write(b" " * 100_000)
    assert "shaper_power_average_watts" in scrape_text(engine.run)


def test_a_sensor_that_is_gone_reaches_the_shaper_the_log_and_the_metrics(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, shown, and told to the shaper."""
    engine.ticks(2)
    engine.gpu.read = lambda: ()
    with caplog.at_level(logging.WARNING, logger="shaper.engine"):
        engine.ticks(100)
    assert engine.shaper.standing is not None
    assert engine.shaper.standing.sensor_lost
    assert 'shaper_sensor_lost{engine="0"} 1.0' in scrape_text(engine.run)
    said = [r.message for r in caplog.records if r.name == "shaper.engine.tick"]
    assert said == ["the GPUs' readings are lost or stuck"]


def test_a_supervisor_that_fails_turns_nobody_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it said last is no longer known; the limits that it set stay."""
    engine.ticks(2)
    engine.shaper.extra = (PowerLimit(600.0, 2.0),)
    assert engine.shaper.standing is not None
    monkeypatch.setattr(engine.supervisor, "tick", lambda *given, **named: 1 / 0)
    engine.ticks(3)
    assert engine.shaper.standing is None
    assert engine.shaper.extra == (PowerLimit(600.0, 2.0),)
    text = scrape_text(engine.run)
    assert 'shaper_supervisor_errors_total{engine="0"} 3.0' in text
    assert "shaper_admission_state{" not in text


def test_a_reading_that_can_not_be_summed_up_is_counted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is published, the state ages, and everything else goes on."""
    engine.ticks(2)
    before = engine.sampler.latest
    monkeypatch.setattr(engine.sampler._screen, "pass_on", lambda samples: 1 / 0)
    engine.ticks(3)
    assert engine.sampler.latest is before
    assert engine.parts.errors["reading"] == 3
    assert 'part="reading"} 3.0' in scrape_text(engine.run)


def test_a_reader_that_raises_something_else_is_a_failed_read(engine: Engine) -> None:
    """It is counted where reads that fail are, and named."""
    engine.ticks(2)
    engine.gpu.read = lambda: 1 / 0
    engine.ticks(3)
    assert engine.sampler.read_errors == 3
    assert engine.parts.errors["reader"] == 3


def test_an_engine_without_a_sensor_counts_no_failure(
    run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`sensor = none`: no read fails, no sensor is lost, nothing is said, and ticks go on."""
    gpu = NoSensor()
    with wired(run, tmp_path, gpu) as engine, caplog.at_level(logging.WARNING):
        engine.ticks(600)
        shown = {(s.name, *s.labels.values()): s.value for s in samples(scrape_text(run))}
    assert engine.sampler.read_errors == engine.sampler.callback_errors == 0
    assert engine.sampler.latest is None
    assert shown["shaper_sample_read_errors_total", "0"] == 0
    assert shown["shaper_sensor_lost", "0"] == 0
    assert shown["shaper_heartbeat_age_seconds", "0"] == 0.0
    assert ("shaper_sample_age_seconds", "0") not in shown
    assert caplog.records == []


def test_a_look_at_the_group_that_fails_does_not_hide_a_smaller_share() -> None:
    """The share is controlled, the look is shown."""
    handle = FakeHandle()
    member = Membership(handle, 700.0, clock=lambda: 5.0)  # type: ignore[arg-type]
    handle.snapshot = lambda now_seconds: SimpleNamespace()  # type: ignore[method-assign]
    handle.static_limits = handle.static_limits[:1]
    assert member.tick("on", decides=True)
    assert member.capped(PowerBudget()).limits == handle.static_limits
