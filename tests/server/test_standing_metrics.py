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
from shaper.core.types import PowerLimit
from shaper.ipc.flex import FlexQueue
from shaper.ipc.status_block import StatusWriter
from tests.scraping import control, run, scrape, write

__all__ = ["run"]


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


def test_a_standing_is_shown_as_it_is(run):
    """Each metric has what its name says; what is not known has no sample."""
    writer = StatusWriter(run, 0, {})
    try:
        write(writer, standing=STANDING)
        values = {name: value for (name, _), value in scrape(run).items()}
        assert values["shaper_admission_state"] == 2
        assert values["shaper_recovery_hint_seconds"] == 7.5
        assert values["shaper_time_to_thermal_slowdown_seconds"] == 42.0
        assert values["shaper_die_margin_celsius"] == 6.0
        assert values["shaper_thermal_limit_watts"] == 600.0
        assert values["shaper_budget_infeasible"] == 1
        assert values["shaper_backlog_tokens"] == 900
        write(writer, standing=EngineStatus(5.0))
        values = {name: value for (name, _), value in scrape(run).items()}
        assert values["shaper_admission_state"] == 0
        assert values["shaper_sensor_lost"] == 0
        assert "shaper_backlog_tokens" not in values
        assert "shaper_thermal_limit_watts" not in values
    finally:
        writer.close()


def test_degraded_is_shown_by_cause_the_worst_gpu_of_each(run):
    """0 says that a cause is judged and does not hold."""
    writer = StatusWriter(run, 0, {})
    try:
        write(writer, standing=STANDING)
        values = scrape(run)
        shown = {
            dict(labels)["cause"]: value
            for (name, labels), value in values.items()
            if name == "shaper_degraded_ratio"
        }
        assert shown == {"clock": 0.3, "thermal": 0.0, "brake": 0.0, "throughput": 0.15}
        assert ("shaper_max_running_requests", (("engine", "0"),)) not in values
        write(writer)
        assert not any("degraded" in name for name, _ in scrape(run))
    finally:
        writer.close()


def test_limits_mode_and_source_follow_a_change(run):
    """What is scraped is what holds now, not what the engine started with."""
    writer = StatusWriter(run, 0, {})
    limit = ("shaper_power_limit_watts", (("engine", "0"), ("window_seconds", "0.1")))
    try:
        for watts, mode, sequence in ((500.0, "on", 3), (400.0, "shadow", 4)):
            write(writer, control=control(watts, mode=mode, taken_sequence=sequence))
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
        queue = FlexQueue(2, 4.0, None, deferrals=9, released=(5, 1, 0, 1), refused=3)
        write(writer, at_seconds=10.0, flex=queue)
        values, engine = scrape(run), (("engine", "0"),)
        names = ("deferred_requests", "oldest_seconds", "deferred_total", "refused_total")
        assert [values[f"shaper_flex_{name}", engine] for name in names] == [2, 6.0, 9, 3]
        aged = (("engine", "0"), ("why", "aged"))
        assert values["shaper_flex_released_total", aged] == 1
    finally:
        writer.close()
