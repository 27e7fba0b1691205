"""What each engine writes into its status block: the numbers and their order.

A table's row is a metric's name and what it says; gauges unless `_total`. What is not
known is NaN. `shaper/server/metrics.py` shows them.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from shaper.core.supervise.status import AdmissionState, Cause, EngineStatus
from shaper.core.types import Decision, PowerState, Reason
from shaper.gpu.sampler import SensorReport
from shaper.ipc.flex import FlexQueue

CHUNK_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REASONS = tuple(Reason)
NAN = math.nan

# Each engine's sampler thread writes these, in this order; gauges unless `_total`.
SAMPLER_METRICS = (
    ("shaper_power_instant_watts", "Power of the engine's GPUs, the meter's shortest window."),
    ("shaper_power_average_watts", "Power of the engine's GPUs, the meter's 1 s average."),
    ("shaper_energy_joules_total", "Energy of the engine's GPUs since it started, as metered."),
    ("shaper_gpu_enforced_limit_watts", "Sum of the driver's enforced power limits."),
    ("shaper_gpu_sm_clock_hertz", "Lowest SM clock of the engine's GPUs."),
    ("shaper_gpu_temperature_celsius", "Highest temperature of the engine's GPUs."),
    ("shaper_gpu_clock_event_reasons", "NVML clock event reasons, the union as a bit mask."),
    (
        "shaper_power_headroom_watts",
        "Least of limit minus mean power over its window: metered, and its group's as committed.",
    ),
    (
        "shaper_power_utilization_ratio",
        "Greatest share of a limit's room above idle in use, its group's too, 0 to 1.",
    ),
    ("shaper_sample_read_errors_total", "Reads of the GPUs that failed."),
    ("shaper_samples_rejected_total", "Readings that were not plausible."),
    ("shaper_supervisor_errors_total", "Ticks at which the supervisor failed."),
    ("shaper_gpu_slowdown_margin_celsius", "Least distance of a GPU from where it slows down."),
    ("shaper_energy_integrated", "1 while energy is summed up from power, for want of a counter."),
    ("shaper_sensor_hanging_seconds", "How long a call of the driver has not returned; 0: none."),
    ("shaper_sensor_reconnects_total", "Times that a lost driver or GPU was found again."),
    ("shaper_gpu_limit_changes_total", "Changes of the GPUs' enforced limits."),
    ("shaper_meter_instant_refresh_seconds", "Between refreshes of the instant reading, as seen."),
    ("shaper_meter_average_refresh_seconds", "Between refreshes of the average reading, as seen."),
    ("shaper_meter_energy_refresh_seconds", "Between refreshes of the energy counter, as seen."),
    ("shaper_meter_average_window_seconds", "Window of the average reading, where it shows."),
    ("shaper_sample_read_p50_seconds", "What a read of all GPUs takes, the median."),
    ("shaper_sample_read_p99_seconds", "What a read of all GPUs takes, 99 of 100."),
    ("shaper_meter_reading_ratio", "Power reading over energy counter, where they are apart."),
    ("shaper_meter_disagrees", "1 while these two differ by more than a tenth on some GPU."),
)
# Written at the end of the sampler's section, shown as the sample's age.
SAMPLED_AT_INDEX = len(SAMPLER_METRICS)
HEARTBEAT_INDEX = SAMPLED_AT_INDEX + 1

SCHEDULER_METRICS = (
    ("shaper_steps_total", "Steps that the engine launched."),
    ("shaper_held_steps_total", "Scheduler calls in which work was held back."),
    ("shaper_step_predicted_watts", "Predicted mean power of the last step."),
    ("shaper_step_measured_watts", "Metered mean power of the steps of the last seconds."),
    ("shaper_step_predicted_seconds", "Predicted length of the last step."),
    ("shaper_step_measured_seconds", "Measured length of the last step that returned."),
    ("shaper_predicted_energy_joules_total", "Predicted energy of all launched steps."),
    ("shaper_model_seconds_gain_ratio", "Measured over predicted step seconds."),
    ("shaper_model_joules_gain_ratio", "Metered over predicted joules."),
    ("shaper_errors_total", "Failures inside the shaper; vLLM went on under the safe cap."),
    ("shaper_forced_steps_total", "Steps that ran over the budget to keep requests moving."),
)

# How the engine stands, by the supervisor; from `standing_values`, in this order.
STANDING_METRICS = (
    ("shaper_admission_state", "0 open, 1 shaped, 2 defer (flex waits), 3 shed (flex refused)."),
    ("shaper_admission_pressure_ratio", "How hard demand presses on the budget, 0 to 1."),
    ("shaper_recovery_hint_seconds", "When work that is turned away should come back."),
    ("shaper_sensor_lost", "1 while the GPUs' readings are lost or stuck."),
    (
        "shaper_time_to_thermal_slowdown_seconds",
        "Until the present load reaches the slowdown temperature.",
    ),
    ("shaper_die_temperature_celsius", "Of the hottest GPU, as estimated."),
    ("shaper_die_margin_celsius", "How far the hottest GPU is below its slowdown temperature."),
    ("shaper_die_steady_celsius", "Where the present load leads."),
    (
        "shaper_thermal_sustainable_watts",
        "What the engine's GPUs bear for good without slowing down.",
    ),
    ("shaper_thermal_limit_watts", "The limit that keeps them below the slowdown temperature."),
    ("shaper_model_margin_ratio", "Part of each limit that is kept free for the model's error."),
    ("shaper_model_disagreement_ratio", "Metered over the model's own watts, minus 1."),
    ("shaper_model_disagrees", "1 while that is more than the error which the model states."),
    ("shaper_budget_infeasible", "1 while the budget is below what serving needs at the least."),
    ("shaper_demand_watts", "What the engine would draw for long if nothing held it back."),
    ("shaper_throttled_ratio", "Share of the last second in which work was held back."),
    ("shaper_backlog_tokens", "Prompt tokens that are not computed yet."),
    ("shaper_oldest_wait_seconds", "How long the oldest prompt has waited for its first step."),
    ("shaper_max_running_requests", "Requests that may run at once, while they are capped."),
    ("shaper_decode_interval_seconds", "Time between decode steps, while they are spaced."),
)
# Flex requests in this engine; from `flex_values`, in this order.
FLEX_METRICS = (
    ("shaper_flex_deferred_requests", "Flex requests that are deferred now."),
    ("shaper_flex_oldest_seconds", "How long the oldest of them has waited."),
    ("shaper_flex_deferred_total", "Flex requests that were deferred."),
    ("shaper_flex_refused_total", "Deferred flex requests that were refused at their bound."),
    ("shaper_flex_errors_total", "Failures of deferral; flex requests then ran as they came."),
)
CAUSES = tuple(Cause)
_ADMISSION_STATES = tuple(AdmissionState)


def or_nan(value: float | None) -> float:
    """What is not known, as the status block holds it."""
    return NAN if value is None else float(value)


def sensor_values(state: PowerState | None, report: SensorReport) -> list[float]:
    """The end of `SAMPLER_METRICS`: of several GPUs, the slowest refresh."""
    margin = None if state is None else state.slowdown_margin_celsius
    facts = report.facts

    def slowest(name: str) -> float:
        return max((or_nan(getattr(one, name)) for one in facts), default=NAN)

    return [
        *(or_nan(margin), float(report.energy_integrated), report.hanging_seconds),
        *(float(report.reconnects), float(report.limit_changes)),
        *(slowest(f"{name}_refresh_seconds") for name in ("instant", "average", "energy")),
        *(slowest(f"{name}_seconds") for name in ("average_window", "read_p50", "read_p99")),
        *(report.read_over_counted_ratio, float(report.meter_disagrees)),
    ]


def standing_values(standing: EngineStatus) -> list[float]:
    """The standing's section: `STANDING_METRICS`, then how much each cause takes away."""
    admission, heat, demand = standing.admissibility, standing.thermal, standing.demand
    missing = dict.fromkeys(CAUSES, 0.0)
    for each in standing.degradations:
        missing[each.cause] = max(missing[each.cause], each.missing_ratio)
    values = [
        float(_ADMISSION_STATES.index(admission.state)),
        admission.pressure_ratio,
        or_nan(admission.recovery_seconds),
        float(standing.sensor_lost),
        *map(or_nan, (heat.slowdown_seconds, heat.die_celsius, heat.margin_celsius)),
        *map(or_nan, (heat.steady_celsius, heat.sustained_watts)),
        NAN if heat.limit is None else heat.limit.watts,
    ]
    if demand is None:
        values += [NAN] * (len(STANDING_METRICS) - len(values))
    else:
        values += [
            *(demand.margin_ratio, demand.disagreement_ratio, float(demand.disagrees)),
            *(float(demand.infeasible), or_nan(demand.wanted_watts), demand.held_ratio),
            *(float(demand.backlog_tokens), demand.oldest_wait_seconds),
            *map(or_nan, (demand.running_cap, demand.cadence_seconds)),
        ]
    return [*values, *missing.values()]


def flex_values(queue: FlexQueue, now_seconds: float) -> list[float]:
    """The flex section: `FLEX_METRICS`, then the requests let in by why."""
    oldest = queue.oldest_deferred_seconds
    return [
        *(queue.deferred_requests, NAN if oldest is None else now_seconds - oldest),
        *(queue.deferrals, queue.refused, queue.errors),
        *queue.released,
    ]


class SchedulerCounters:
    """What the scheduler's thread counts, and its section of the status block."""

    def __init__(self) -> None:
        self.steps = self.held = self.errors = self.forced = 0
        self.predicted_watts = self.predicted_seconds = NAN
        self.measured_watts = self.measured_seconds = NAN
        self.predicted_joules = 0.0
        self.seconds_gain = self.joules_gain = 1.0
        self._decisions = dict.fromkeys(REASONS, 0)
        self._chunks = [0] * (len(CHUNK_BUCKETS) + 1)
        self._chunk_tokens = 0

    def count(self, decision: Decision) -> None:
        """Enter one decision."""
        self._decisions[decision.reason] += 1
        self.held += decision.limits.binding
        self.forced += decision.reason is Reason.FORCED_OVER_BUDGET
        tokens = decision.prefill_tokens
        # Under the safe cap a step runs without a prediction.
        if tokens or decision.decode_requests:
            self.steps += 1
        predicted = decision.predicted
        if predicted.seconds:
            self.predicted_watts = predicted.watts
            self.predicted_seconds = predicted.seconds
            self.predicted_joules += predicted.joules
        if tokens:
            self._chunks[bisect_left(CHUNK_BUCKETS, tokens)] += 1
            self._chunk_tokens += tokens

    def values(self) -> list[float]:
        """The section, in the order of `SCHEDULER_METRICS`, decisions and chunks behind."""
        return [
            *(self.steps, self.held, self.predicted_watts, self.measured_watts),
            *(self.predicted_seconds, self.measured_seconds, self.predicted_joules),
            *(self.seconds_gain, self.joules_gain, self.errors, self.forced),
            *self._decisions.values(),
            *self._chunks,
            self._chunk_tokens,
        ]
