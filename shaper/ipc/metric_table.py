"""Every metric of an engine: its name, what it says, and where a status has it.

A metric is a gauge unless its name ends in `_total`. What is None or NaN is not shown.
`shaper/server/metrics.py` shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from shaper.core.budget import Source
from shaper.core.supervise.status import AdmissionState, Cause, EngineStatus
from shaper.core.types import PowerLimit
from shaper.ipc.control_file import MODES
from shaper.ipc.enforcement import UNKEPT_REASONS, enforcement_of
from shaper.ipc.engine_record import EngineRecord, Status
from shaper.ipc.flex import RELEASED
from shaper.ipc.group_status import MEMBER_STATES, GroupStatus

Shown = float | None | Mapping[Any, float]
"""A number, or one for each value of the label, or tuple of values of the labels."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of an engine."""

    name: str
    get: Callable[[Status], Shown]
    text: str
    labels: tuple[str, ...] = ()
    """Beside `engine`."""


def _part(
    part: Callable[[EngineRecord], _T | None],
) -> Callable[[Callable[[_T], Shown]], Callable[[Status], Shown]]:
    """Makes getters that look at one part of the record, and say nothing where it is missing."""

    def of(get: Callable[[_T], Shown]) -> Callable[[Status], Shown]:
        def look(status: Status) -> Shown:
            found = part(status.record)
            return None if found is None else get(found)

        return look

    return of


_power = _part(lambda record: record.power)
_sensor = _part(lambda record: record.sensor)
_usage = _part(lambda record: record.usage)
_control = _part(lambda record: record.control)
_group = _part(lambda record: record.group)
_standing = _part(lambda record: record.standing)
_demand = _part(lambda record: None if record.standing is None else record.standing.demand)
_flex = _part(lambda record: record.flex)
_counters = _part(lambda record: record.counters)


def _info(status: Status) -> Shown:
    return {tuple(str(status.info.get(key, "")) for key in INFO_LABELS): 1.0}


def _age(seconds: float | None, status: Status) -> float | None:
    return None if seconds is None else max(0.0, status.read_seconds - seconds)


def _one_of(known: Iterable[str], now: str | None) -> Shown:
    """1 for what is so now, and 0 for the others."""
    return {each: float(each == now) for each in known}


def _by_window(limits: tuple[PowerLimit, ...]) -> dict[str, float]:
    return {f"{limit.window_seconds:g}": limit.watts for limit in limits}


def _group_limits(status: Status) -> Shown:
    name, group = str(status.info.get("group", "")), status.record.group
    limits = {} if group is None else _by_window(group.limits)
    return {(name, window): watts for window, watts in limits.items()}


def _members(group: GroupStatus) -> Shown:
    return {state: group.count(state) for state in MEMBER_STATES}


def _degraded(standing: EngineStatus) -> Shown:
    missing = dict.fromkeys(Cause, 0.0)
    for each in standing.degradations:
        missing[each.cause] = max(missing[each.cause], each.missing_ratio)
    return missing


def _admission(standing: EngineStatus) -> Shown:
    return tuple(AdmissionState).index(standing.admissibility.state)


def _heat_limit(standing: EngineStatus) -> Shown:
    limit = standing.thermal.limit
    return None if limit is None else limit.watts


def _flex_oldest(status: Status) -> Shown:
    flex, now = status.record.flex, status.record.at_seconds
    if flex is None or now is None or flex.oldest_deferred_seconds is None:
        return None
    return now - flex.oldest_deferred_seconds


INFO_LABELS = ("version", "gpu", "model", "policy", "shadow")

# fmt: off
# A row on two lines: where a status has it, and what it says.
METRICS = (
    Metric("shaper_info", _info,
        "What this engine's shaper runs with.", INFO_LABELS),
    # --- the GPUs and their readings
    Metric("shaper_power_instant_watts", _power(lambda p: p.instant_watts),
        "Power of the engine's GPUs, the meter's shortest window."),
    Metric("shaper_power_average_watts", _power(lambda p: p.average_watts),
        "Power of the engine's GPUs, the meter's 1 s average."),
    Metric("shaper_energy_joules_total", _power(lambda p: p.energy_joules),
        "Energy of the engine's GPUs since it started, as metered."),
    Metric("shaper_gpu_enforced_limit_watts", _power(lambda p: p.enforced_limit_watts),
        "Sum of the driver's enforced power limits."),
    Metric("shaper_gpu_sm_clock_hertz", _power(lambda p: p.sm_clock_hertz),
        "Lowest SM clock of the engine's GPUs."),
    Metric("shaper_gpu_temperature_celsius", _power(lambda p: p.temperature_celsius),
        "Highest temperature of the engine's GPUs."),
    Metric("shaper_gpu_clock_event_reasons", _power(lambda p: p.clock_event_reasons),
        "NVML clock event reasons, the union as a bit mask."),
    Metric("shaper_power_headroom_watts", _usage(lambda u: u.headroom_watts),
        "Least of limit minus mean power over its window: metered, and its group's as committed."),
    Metric("shaper_power_utilization_ratio", _usage(lambda u: u.use_ratio),
        "Greatest share of a limit's room above idle in use, its group's too, 0 to 1."),
    Metric("shaper_sample_read_errors_total", _sensor(lambda s: s.read_errors),
        "Reads of the GPUs that failed."),
    Metric("shaper_samples_rejected_total", _sensor(lambda s: s.rejected_readings),
        "Readings that were not plausible."),
    Metric("shaper_supervisor_errors_total", lambda s: s.record.failures.get("supervisor"),
        "Ticks at which the supervisor failed."),
    Metric("shaper_gpu_slowdown_margin_celsius", _power(lambda p: p.slowdown_margin_celsius),
        "Least distance of a GPU from where it slows down."),
    Metric("shaper_energy_integrated", _sensor(lambda s: s.energy_integrated),
        "1 while energy is summed up from power, for want of a counter."),
    Metric("shaper_sensor_hanging_seconds", _sensor(lambda s: s.hanging_seconds),
        "How long a call of the driver has not returned; 0: none."),
    Metric("shaper_sensor_reconnects_total", _sensor(lambda s: s.reconnects),
        "Times that a lost driver or GPU was found again."),
    Metric("shaper_gpu_limit_changes_total", _sensor(lambda s: s.limit_changes),
        "Changes of the GPUs' enforced limits."),
    Metric("shaper_meter_reading_ratio", _sensor(lambda s: s.read_over_counted_ratio),
        "Power reading over energy counter, where they are apart."),
    Metric("shaper_meter_disagrees", _sensor(lambda s: s.meter_disagrees),
        "1 while these two differ by more than a tenth on some GPU."),
    Metric("shaper_sample_age_seconds",
        lambda s: _age(None if s.record.power is None else s.record.power.sampled_seconds, s),
        "Time since the GPUs were last read."),
    Metric("shaper_heartbeat_age_seconds", lambda s: _age(s.record.at_seconds, s),
        "Time since the sampler last ran."),
    # --- what each engine holds itself to
    Metric("shaper_power_limit_watts", _control(lambda c: _by_window(c.budget.limits)),
        "Power limit in force, by the window it is averaged over; of the engine's GPUs together.",
        ("window_seconds",)),
    Metric("shaper_ramp_limit_watts_per_second", _control(lambda c: c.budget.ramp_watts_per_second),
        "How much the mean power of 100 ms may rise within a second."),
    Metric("shaper_mode", _control(lambda c: _one_of(MODES, c.mode)),
        "1 for the mode that the engine is in.", ("mode",)),
    Metric("shaper_budget_source", _control(lambda c: _one_of(Source, c.source)),
        "1 for what the budget in force comes from.", ("source",)),
    Metric("shaper_control_changes_total", _control(lambda c: c.taken_sequence),
        "The last change of budget or mode that the engine has followed."),
    Metric("shaper_control_refused_total", _control(lambda c: c.refused),
        "Changes that the engine did not believe or could not follow."),
    Metric("shaper_limit_unkept", lambda s: _one_of(UNKEPT_REASONS, enforcement_of(s).unkept),
        "1 where an operator's power limit is set and nobody keeps it, by why; 0 where it is "
        "kept, or none is set.", ("reason",)),
    # --- its power group
    Metric("shaper_group_limit_watts", _group_limits,
        "Limit of the power group, by the window it is averaged over; of all its engines' GPUs.",
        ("group", "window_seconds")),
    Metric("shaper_group_engines", _group(_members),
        "Engines of the group by state.", ("state",)),
    Metric("shaper_group_committed_watts", _group(lambda g: g.committed_watts),
        "Power of all engines, as committed for the last 100 ms."),
    Metric("shaper_group_floor_watts", _group(lambda g: g.floor_watts),
        "What this engine draws in its group whatever comes next."),
    Metric("shaper_group_oldest_wait_seconds", _group(lambda g: g.oldest_wait_seconds),
        "How long the group's first held back prompt has waited."),
    Metric("shaper_group_claims_refused_total", _group(lambda g: g.claims_refused),
        "Steps that fitted no longer when they were claimed."),
    Metric("shaper_group_fallback_steps_total", _group(lambda g: g.static_steps),
        "Steps on the static share: the lock was not to be had."),
    Metric("shaper_group_lock_wait_seconds_total", _group(lambda g: g.lock_wait_seconds),
        "Time that this engine waited for the group's lock."),
    Metric("shaper_group_detached", _group(lambda g: g.detached),
        "1: the group's file was removed; who joins now is not seen."),
    Metric("shaper_group_errors_total", _group(lambda g: g.errors),
        "Failures to keep the group's heartbeat, or to read its state."),
    # --- how it stands, by the supervisor
    Metric("shaper_admission_state", _standing(_admission),
        "0 open, 1 shaped, 2 defer (flex waits), 3 shed (flex refused)."),
    Metric("shaper_admission_pressure_ratio", _standing(lambda s: s.admissibility.pressure_ratio),
        "How hard demand presses on the budget, 0 to 1."),
    Metric("shaper_recovery_hint_seconds", _standing(lambda s: s.admissibility.recovery_seconds),
        "When work that is turned away should come back."),
    Metric("shaper_sensor_lost", _standing(lambda s: s.sensor_lost),
        "1 while the GPUs' readings are lost or stuck."),
    Metric("shaper_time_to_thermal_slowdown_seconds",
        _standing(lambda s: s.thermal.slowdown_seconds),
        "Until the present load reaches the slowdown temperature."),
    Metric("shaper_die_temperature_celsius", _standing(lambda s: s.thermal.die_celsius),
        "Of the hottest GPU, as estimated."),
    Metric("shaper_die_margin_celsius", _standing(lambda s: s.thermal.margin_celsius),
        "How far the hottest GPU is below its slowdown temperature."),
    Metric("shaper_die_steady_celsius", _standing(lambda s: s.thermal.steady_celsius),
        "Where the present load leads."),
    Metric("shaper_thermal_sustainable_watts", _standing(lambda s: s.thermal.sustained_watts),
        "What the engine's GPUs bear for good without slowing down."),
    Metric("shaper_thermal_limit_watts", _standing(_heat_limit),
        "The limit that keeps them below the slowdown temperature."),
    Metric("shaper_model_margin_ratio", _demand(lambda d: d.margin_ratio),
        "Part of each limit that is kept free for the model's error."),
    Metric("shaper_model_disagreement_ratio", _demand(lambda d: d.disagreement_ratio),
        "Metered over the model's own watts, minus 1."),
    Metric("shaper_model_disagrees", _demand(lambda d: d.disagrees),
        "1 while that is more than the error which the model states."),
    Metric("shaper_budget_infeasible", _demand(lambda d: d.infeasible),
        "1 while the budget is below what serving needs at the least."),
    Metric("shaper_demand_watts", _demand(lambda d: d.wanted_watts),
        "What the engine would draw for long if nothing held it back."),
    Metric("shaper_throttled_ratio", _demand(lambda d: d.held_ratio),
        "Share of the last second in which work was held back."),
    Metric("shaper_backlog_tokens", _demand(lambda d: d.backlog_tokens),
        "Prompt tokens that are not computed yet."),
    Metric("shaper_oldest_wait_seconds", _demand(lambda d: d.oldest_wait_seconds),
        "How long the oldest prompt has waited for its first step."),
    Metric("shaper_max_running_requests", _demand(lambda d: d.running_cap),
        "Requests that may run at once, while they are capped."),
    Metric("shaper_decode_interval_seconds", _demand(lambda d: d.cadence_seconds),
        "Time between decode steps, while they are spaced."),
    Metric("shaper_degraded_ratio", _standing(_degraded),
        "What the GPUs give less than their state should give, by cause; 0: nothing.", ("cause",)),
    # --- flex requests in it
    Metric("shaper_flex_deferred_requests", _flex(lambda f: f.deferred_requests),
        "Flex requests that are deferred now."),
    Metric("shaper_flex_oldest_seconds", _flex_oldest,
        "How long the oldest of them has waited."),
    Metric("shaper_flex_deferred_total", _flex(lambda f: f.deferrals),
        "Flex requests that were deferred."),
    Metric("shaper_flex_refused_total", _flex(lambda f: f.refused),
        "Deferred flex requests that were refused at their bound."),
    Metric("shaper_flex_errors_total", _flex(lambda f: f.errors),
        "Failures of deferral; flex requests then ran as they came."),
    Metric("shaper_flex_released_total",
        _flex(lambda f: dict(zip(RELEASED, f.released, strict=True))),
        "Deferred flex requests that were let in, by why.", ("why",)),
    # --- its steps
    Metric("shaper_steps_total", _counters(lambda c: c.steps),
        "Steps that the engine launched."),
    Metric("shaper_held_steps_total", _counters(lambda c: c.held),
        "Scheduler calls in which work was held back."),
    Metric("shaper_step_predicted_watts", _counters(lambda c: c.predicted_watts),
        "Predicted mean power of the last step."),
    Metric("shaper_step_measured_watts", _counters(lambda c: c.measured_watts),
        "Metered mean power of the steps of the last seconds."),
    Metric("shaper_step_predicted_seconds", _counters(lambda c: c.predicted_seconds),
        "Predicted length of the last step."),
    Metric("shaper_step_measured_seconds", _counters(lambda c: c.measured_seconds),
        "Measured length of the last step that returned."),
    Metric("shaper_predicted_energy_joules_total", _counters(lambda c: c.predicted_joules),
        "Predicted energy of all launched steps."),
    Metric("shaper_model_seconds_gain_ratio", _counters(lambda c: c.seconds_gain),
        "Measured over predicted step seconds."),
    Metric("shaper_model_joules_gain_ratio", _counters(lambda c: c.joules_gain),
        "Metered over predicted joules."),
    Metric("shaper_errors_total", _counters(lambda c: c.errors),
        "Failures inside the shaper; vLLM went on under the fallback cap."),
    Metric("shaper_forced_steps_total", _counters(lambda c: c.forced),
        "Steps that ran over the budget to keep requests moving."),
    Metric("shaper_decisions_total", _counters(lambda c: c.decisions),
        "Scheduler calls by why they got their limits.", ("reason",)),
    Metric("shaper_part_errors_total", lambda s: s.record.failures,
        "Failures of one part of the shaper, by part; the other parts went on.", ("part",)),
)
# fmt: on
