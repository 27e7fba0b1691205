"""The metrics: one table of what each engine writes, and the collector that shows it.

Names follow Prometheus: base units, `shaper_` prefix, `_total` for counters. A
value that is NaN is left out. See `shaper/status.py` for how numbers get here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from shaper.core.types import Decision, Reason
from shaper.status import Status

CHUNK_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REASONS = tuple(Reason)
MAX_LIMITS = 8
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
    ("shaper_power_headroom_watts", "Least of limit minus metered mean power over its window."),
    ("shaper_pressure_ratio", "Greatest share of a limit's room above idle in use, 0 to 1."),
    ("shaper_sample_read_errors_total", "Reads of the GPUs that failed."),
    ("shaper_samples_rejected_total", "Readings that were not plausible."),
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
        self.forced += decision.reason is Reason.FORCED
        # Under the safe cap a step runs without a prediction.
        if decision.decode_requests or decision.prefill_tokens:
            self.steps += 1
        if decision.predicted.seconds:
            self.predicted_watts = decision.predicted.watts
            self.predicted_seconds = decision.predicted.seconds
            self.predicted_joules += decision.predicted.joules
        if decision.prefill_tokens:
            bucket = next(
                (i for i, top in enumerate(CHUNK_BUCKETS) if decision.prefill_tokens <= top),
                len(CHUNK_BUCKETS),
            )
            self._chunks[bucket] += 1
            self._chunk_tokens += decision.prefill_tokens

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


class StatusCollector(Collector):
    """Shows the status blocks of a run's engines.

    Args:
        read: returns the blocks; called once a scrape.
    """

    def __init__(self, read: Callable[[], Iterable[Status]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing: lets the collector register before any engine is there."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families, with one sample per engine."""
        statuses = list(self._read())
        if not statuses:
            return
        now = time.monotonic()
        yield _info(statuses)
        yield from _table(statuses, "sampler", SAMPLER_METRICS)
        yield from _ages(statuses, now)
        yield _limits(statuses)
        yield from _table(statuses, "scheduler", SCHEDULER_METRICS)
        yield _decisions(statuses)
        yield _chunks(statuses)


def _engine(status: Status) -> str:
    return str(status.info["engine"])


def _info(statuses: Sequence[Status]) -> Metric:
    keys = ("version", "gpu", "model", "policy", "shadow")
    family = GaugeMetricFamily(
        "shaper_info", "What this engine's shaper runs with.", labels=("engine", *keys)
    )
    for status in statuses:
        family.add_metric([_engine(status), *(str(status.info.get(k, "")) for k in keys)], 1.0)
    return family


def _table(
    statuses: Sequence[Status], section: str, table: Sequence[tuple[str, str]]
) -> Iterator[Metric]:
    for index, (name, text) in enumerate(table):
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        family = kind(name, text, labels=("engine",))
        for status in statuses:
            values = status.values[section]
            if index < len(values) and not math.isnan(values[index]):
                family.add_metric([_engine(status)], values[index])
        yield family


def _ages(statuses: Sequence[Status], now: float) -> Iterator[Metric]:
    for name, text, index in (
        ("shaper_sample_age_seconds", "Time since the GPUs were last read.", SAMPLED_AT_INDEX),
        ("shaper_heartbeat_age_seconds", "Time since the sampler last ran.", HEARTBEAT_INDEX),
    ):
        family = GaugeMetricFamily(name, text, labels=("engine",))
        for status in statuses:
            values = status.values["sampler"]
            if index < len(values) and not math.isnan(values[index]):
                family.add_metric([_engine(status)], max(0.0, now - values[index]))
        yield family


def _limits(statuses: Sequence[Status]) -> Metric:
    family = GaugeMetricFamily(
        "shaper_power_limit_watts",
        "Power limit of the engine, by the window it is averaged over.",
        labels=("engine", "window_seconds"),
    )
    for status in statuses:
        limits = status.info.get("limits", [])
        assert isinstance(limits, list)
        for watts, window_seconds in limits:
            family.add_metric([_engine(status), f"{window_seconds:g}"], watts)
    return family


def _decisions(statuses: Sequence[Status]) -> Metric:
    family = CounterMetricFamily(
        "shaper_decisions_total",
        "Scheduler calls by why they got their limits.",
        labels=("engine", "reason"),
    )
    first = len(SCHEDULER_METRICS)
    for status in statuses:
        counts = status.values["scheduler"][first : first + len(REASONS)]
        for reason, count in zip(REASONS, counts, strict=False):
            family.add_metric([_engine(status), reason.value], count)
    return family


def _chunks(statuses: Sequence[Status]) -> Metric:
    family = HistogramMetricFamily(
        "shaper_prefill_chunk_tokens", "Prompt tokens in a step that had any.", labels=("engine",)
    )
    first = len(SCHEDULER_METRICS) + len(REASONS)
    tops = [*(f"{top}" for top in CHUNK_BUCKETS), "+Inf"]
    for status in statuses:
        values = status.values["scheduler"][first:]
        if len(values) < len(tops) + 1:
            continue
        buckets, running = [], 0.0
        for top, count in zip(tops, values, strict=False):
            running += count
            buckets.append((top, running))
        family.add_metric([_engine(status)], buckets, values[len(tops)])
    return family
