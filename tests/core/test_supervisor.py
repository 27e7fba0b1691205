"""What the supervisor says of an engine, from what the sampler and the controller say."""

from __future__ import annotations

from dataclasses import replace

from shaper.core.supervise.admission import Admission, AdmissionInput
from shaper.core.supervise.status import (
    Admissibility,
    AdmissionState,
    Cause,
    EngineDemand,
    EngineStatus,
)
from shaper.core.supervise.supervisor import Supervisor
from shaper.core.types import ClockEventReasons, GpuSample, PowerState
from shaper.gpu.profiles import load_profile
from shaper.gpu.summary import summarise

TICK_SECONDS = 0.02
PROFILE = load_profile("h200-sxm")
BUSY = EngineDemand(0.0, busy=True, running_requests=8)


class Recorder(Admission):
    """An admission that keeps what it was asked, and answers the same each time."""

    def __init__(self, answer: Admissibility) -> None:
        self.answer, self.asked = answer, list[tuple[float, AdmissionInput]]()

    def update(self, given: AdmissionInput, now_seconds: float) -> Admissibility:
        self.asked.append((now_seconds, given))
        return self.answer


def state_at(now: float, **values: object) -> PowerState:
    sample = GpuSample(
        now,
        0,
        instant_watts=450.0,
        energy_joules=450.0 * now,
        sm_clock_hertz=PROFILE.clocks.sm_max_hertz,
        temperature_celsius=62.0,
    )
    return summarise([replace(sample, **values)])  # type: ignore[arg-type]


def run(
    supervisor: Supervisor,
    start: float,
    seconds: float,
    demand: EngineDemand | None = BUSY,
    *,
    shapes_heat: bool = True,
    **values: object,
) -> tuple[EngineStatus, list[str]]:
    """Tick for a while; the last standing and all lines."""
    lines: list[str] = []
    standing = None
    for tick in range(1, round(seconds / TICK_SECONDS) + 1):
        now = start + tick * TICK_SECONDS
        at = None if demand is None else replace(demand, at_seconds=now)
        standing = supervisor.tick(now, state_at(now, **values), at, shapes_heat=shapes_heat)
        lines += standing.announcements
    assert standing is not None
    return standing, lines


def test_a_well_engine_stands_well() -> None:
    """Nothing is degraded, lost, limited or said."""
    standing, lines = run(Supervisor(PROFILE), 0.0, 60.0)
    assert (standing.degradations, standing.limits, standing.sensor_lost) == ((), (), False)
    assert standing.admissibility == Admissibility()
    assert standing.thermal.slowdown_seconds is None
    assert lines == []


def test_admission_is_asked_at_each_tick_with_what_was_judged() -> None:
    """Its answer is passed on as it is."""
    answer = Admissibility(AdmissionState.DEFER, 0.9, "hot", 12.0)
    admission = Recorder(answer)
    supervisor = Supervisor(PROFILE, admission=admission)
    run(supervisor, 0.0, 30.0)
    standing, lines = run(supervisor, 30.0, 10.0, sm_clock_hertz=1.2e9)
    assert standing.admissibility is answer
    assert len(admission.asked) == 2000
    assert [each.cause for each in standing.degradations] == [Cause.CLOCK]
    assert len(lines) == 1


def test_an_engine_that_no_longer_plans_has_no_work() -> None:
    """The controller's last word says busy; nothing has been planned for seconds."""
    admission = Recorder(Admissibility())
    supervisor = Supervisor(PROFILE, admission=admission)
    for now in (1.0, 2.0, 4.0):
        supervisor.tick(now, state_at(now), replace(BUSY, at_seconds=1.0, held_ratio=0.7))
    assert [given.held_ratio for _, given in admission.asked] == [0.7, 0.7, 0.0]


def test_a_sensor_is_lost_when_its_state_is_old_and_found_when_it_is_not() -> None:
    """Each is said once; a flicker is one episode."""
    supervisor = Supervisor(PROFILE)
    run(supervisor, 0.0, 10.0)
    lines: list[str] = []
    old = state_at(10.0)
    lost = []
    for tick in range(150):
        now = 10.0 + tick * TICK_SECONDS
        # It comes back for one reading after two seconds, and is gone again.
        standing = supervisor.tick(now, state_at(now) if tick == 100 else old, BUSY)
        lost.append(standing.sensor_lost)
        lines += standing.announcements
    assert lost.index(True) == 51
    assert not lost[100]
    assert lines == ["the GPUs' readings are lost or stuck"]
    standing, lines = run(supervisor, 13.0, 20.0)
    assert not standing.sensor_lost
    assert lines == ["the GPUs are read again"]


def test_a_sensor_that_never_came_is_lost_after_the_start() -> None:
    """A driver may take some seconds to answer first."""
    supervisor = Supervisor(PROFILE)
    assert not supervisor.tick(0.0, None, None).sensor_lost
    assert not supervisor.tick(4.0, None, None).sensor_lost
    assert supervisor.tick(6.0, None, None).sensor_lost


def test_disagreement_and_an_infeasible_budget_are_said() -> None:
    """What the controller knows reaches the log and the metrics, once each way."""
    supervisor = Supervisor(PROFILE)
    _, lines = run(supervisor, 0.0, 5.0, replace(BUSY, disagrees=True, infeasible=True))
    assert len(lines) == 2
    standing, lines = run(supervisor, 5.0, 15.0)
    assert len(lines) == 2
    assert standing.demand is not None
    assert not standing.demand.infeasible


def test_heat_becomes_one_more_limit_unless_that_is_switched_off() -> None:
    """86 degrees under load: a limit, and a line that says why. Switched off: none."""
    for shapes in (True, False):
        supervisor = Supervisor(PROFILE)
        hot = {"temperature_celsius": 85.0, "instant_watts": 600.0}
        standing, lines = run(supervisor, 0.0, 20.0, shapes_heat=shapes, **hot)  # type: ignore[arg-type]
        assert bool(standing.limits) is shapes
        assert [line.startswith("heat:") for line in lines] == [True] * shapes
        assert standing.thermal.die_celsius is not None


def test_without_a_controller_the_gpus_are_still_judged() -> None:
    """The shaper is off or under the fallback cap: a brake shows all the same."""
    brake = ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN
    standing, _ = run(Supervisor(PROFILE), 0.0, 3.0, None, clock_event_reasons=brake)
    assert [each.cause for each in standing.degradations] == [Cause.BRAKE]
    assert standing.demand is None
