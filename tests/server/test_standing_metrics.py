"""How an engine stands, as metrics, and what carries it there."""

from __future__ import annotations

from shaper.core.supervise.status import (
    Admissibility,
    AdmissionState,
    Cause,
    Degradation,
    EngineDemand,
    EngineStatus,
    ThermalOutlook,
)
from shaper.core.supervise.supervisor import Supervisor
from shaper.core.types import PowerBudget, PowerLimit, PowerState
from shaper.engine.telemetry import DecisionLog, Telemetry
from shaper.gpu.profiles import load_profile
from shaper.ipc.flex import FlexQueue
from shaper.ipc.metric_table import (
    FLEX_METRICS,
    STANDING_METRICS,
    SchedulerCounters,
    standing_values,
)
from shaper.ipc.status_block import StatusWriter
from tests.scraping import control, run, scrape

__all__ = ["run"]


class Engine:
    """A shaper as the telemetry sees it."""

    def __init__(self, limits: tuple[PowerLimit, ...] = ()) -> None:
        self.counters = SchedulerCounters()
        self.budget = PowerBudget(limits)
        self.demand: EngineDemand | None = None
        self.standing: EngineStatus | None = None
        self.extra: tuple[PowerLimit, ...] = ()

    def set_extra_limits(self, limits: tuple[PowerLimit, ...]) -> None:
        self.extra = limits


STANDING = EngineStatus(
    at_seconds=5.0,
    admissibility=Admissibility(AdmissionState.DEFER, 0.8, "budget", 7.5),
    degradations=(
        Degradation(Cause.CLOCK, 0.2, 1.0, 0),
        Degradation(Cause.CLOCK, 0.3, 2.0, 3),
        Degradation(Cause.THROUGHPUT, 0.15, 2.0),
    ),
    thermal=ThermalOutlook(81.0, 6.0, 90.0, 42.0, 560.0, PowerLimit(600.0, 2.0)),
    demand=EngineDemand(5.0, busy=True, backlog_tokens=900, margin_ratio=0.02, infeasible=True),
)


def test_a_standing_has_one_number_for_each_metric():
    """What each row of the table says is what stands in its place; the causes come behind."""
    values = dict(
        zip((name for name, _ in STANDING_METRICS), standing_values(STANDING), strict=False)
    )
    assert values["shaper_admission_state"] == 2
    assert values["shaper_recovery_hint_seconds"] == 7.5
    assert values["shaper_time_to_thermal_slowdown_seconds"] == 42.0
    assert values["shaper_die_margin_celsius"] == 6.0
    assert values["shaper_thermal_limit_watts"] == 600.0
    assert values["shaper_budget_infeasible"] == 1
    assert values["shaper_backlog_tokens"] == 900
    assert len(standing_values(STANDING)) == len(STANDING_METRICS) + len(Cause)
    blank = standing_values(EngineStatus(5.0))
    assert len(blank) == len(STANDING_METRICS) + len(Cause)


def test_degraded_is_shown_by_cause_the_worst_gpu_of_each(run):
    """0 says that a cause is judged and does not hold."""
    writer = StatusWriter(run, 0, {})
    try:
        writer.write("standing", standing_values(STANDING))
        values = scrape(run)
        shown = {
            dict(labels)["cause"]: value
            for (name, labels), value in values.items()
            if name == "shaper_degraded_ratio"
        }
        assert shown == {"clock": 0.3, "thermal": 0.0, "brake": 0.0, "throughput": 0.15}
        assert ("shaper_max_running_requests", (("engine", "0"),)) not in values
        writer.write("standing", [])
        assert not any("degraded" in name for name, _ in scrape(run))
    finally:
        writer.close()


def test_limits_mode_and_source_follow_a_change(run):
    """What is scraped is what holds now, not what the engine started with."""
    writer = StatusWriter(run, 0, {})
    limit = ("shaper_power_limit_watts", (("engine", "0"), ("window_seconds", "0.1")))
    try:
        for watts, mode, sequence in ((500.0, "on", 3), (400.0, "shadow", 4)):
            writer.write("control", control(watts, mode=mode, taken_sequence=sequence).values())
            values = scrape(run)
            assert values[limit] == watts
            assert values["shaper_mode", (("engine", "0"), ("mode", mode))] == 1
            assert values["shaper_control_changes_total", (("engine", "0"),)] == sequence
        assert values["shaper_mode", (("engine", "0"), ("mode", "on"))] == 0
        assert ("shaper_ramp_limit_watts_per_second", (("engine", "0"),)) not in values
    finally:
        writer.close()


def test_the_flex_queue_is_shown(run):
    """Ages are counted at the tick; releases by why."""
    writer = StatusWriter(run, 0, {})
    try:
        telemetry = Telemetry(writer, 100.0, DecisionLog(None))
        queue = FlexQueue(2, 4.0, None, deferrals=9, released=(5, 1, 0, 1), refused=3)
        telemetry.attach(Engine(), lambda: queue)
        telemetry.tick(10.0, None, 0, 0)
        values, engine = scrape(run), (("engine", "0"),)
        assert [values[name, engine] for name, _ in FLEX_METRICS] == [2, 6.0, 9, 3, 0]
        aged = (("engine", "0"), ("why", "aged"))
        assert values["shaper_flex_released_total", aged] == 1
    finally:
        writer.close()


def test_the_supervisor_s_word_reaches_the_shaper_the_log_and_the_metrics(run, caplog):
    """A sensor that is gone: said once, shown, and told to the shaper."""
    writer = StatusWriter(run, 0, {})
    try:
        supervisor = Supervisor(load_profile("h200-sxm"))
        telemetry = Telemetry(writer, 100.0, DecisionLog(None), supervisor=supervisor)
        engine = Engine()
        telemetry.attach(engine)
        for tick in range(500):
            telemetry.tick(0.02 * tick, PowerState(0.0, 1, instant_watts=400.0), 0, 0)
        assert engine.standing is telemetry.standing
        assert engine.standing is not None
        assert engine.standing.sensor_lost
        assert scrape(run)["shaper_sensor_lost", (("engine", "0"),)] == 1
        assert [r.message for r in caplog.records] == ["the GPUs' readings are lost or stuck"]
    finally:
        writer.close()


def test_a_supervisor_that_fails_costs_its_word_and_nothing_else(run, caplog):
    """The metrics go on, nobody is turned away on old news, and it is logged once."""

    class Broken(Supervisor):
        def tick(self, now_seconds, state, demand):
            raise ZeroDivisionError("a mistake")

    writer = StatusWriter(run, 0, {})
    try:
        broken = Broken(load_profile("h200-sxm"))
        telemetry = Telemetry(writer, 100.0, DecisionLog(None), supervisor=broken)
        engine = Engine()
        engine.standing, engine.extra = STANDING, STANDING.limits
        telemetry.attach(engine)
        for tick in range(3):
            telemetry.tick(1.0 + tick, PowerState(1.0 + tick, 1, instant_watts=400.0), 0, 0)
        assert telemetry.standing is None
        assert engine.standing is None
        assert engine.extra == STANDING.limits
        values = scrape(run)
        assert values["shaper_supervisor_errors_total", (("engine", "0"),)] == 3
        assert values["shaper_power_instant_watts", (("engine", "0"),)] == 400.0
        assert len(caplog.records) == 1
    finally:
        writer.close()
