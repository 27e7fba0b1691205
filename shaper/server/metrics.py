"""The metrics: the collector that shows what each engine writes.

Names follow Prometheus: base units, `shaper_` prefix, `_total` for counters. A
value that is NaN is left out. See `shaper/ipc/metric_table.py` for the numbers, and
`shaper/ipc/status_block.py` for how they get here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from shaper.core.budget import Source
from shaper.gpu.parts import PARTS
from shaper.ipc.control_file import MODES, EngineControl
from shaper.ipc.enforcement import UNKEPT_REASONS, enforcement_of
from shaper.ipc.flex import RELEASED
from shaper.ipc.group_status import GROUP_METRICS, MEMBER_STATES, GroupStatus
from shaper.ipc.metric_table import (
    CAUSES,
    CHUNK_BUCKETS,
    FLEX_METRICS,
    HEARTBEAT_INDEX,
    REASONS,
    SAMPLED_AT_INDEX,
    SAMPLER_METRICS,
    SCHEDULER_METRICS,
    STANDING_METRICS,
)
from shaper.ipc.status_block import Status


class StatusCollector(Collector):
    """Shows the status blocks of a run's engines.

    Args:
        read: returns the blocks; called once a scrape.
        refused: returns the requests that API servers refused, by class and reason.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Status]],
        refused: Callable[[], Mapping[tuple[str, str], int]] = dict,
    ) -> None:
        self._read, self._refused = read, refused

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
        yield from _control(statuses)
        yield _unkept(statuses)
        yield from _group(statuses)
        yield from _table(statuses, "standing", STANDING_METRICS)
        yield _degraded(statuses)
        yield from _table(statuses, "flex", FLEX_METRICS)
        yield _released(statuses)
        yield _refused(statuses, self._refused())
        yield from _table(statuses, "scheduler", SCHEDULER_METRICS)
        yield _decisions(statuses)
        yield _chunks(statuses)
        yield _parts(statuses)


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


def _labelled(
    statuses: Sequence[Status],
    section: str,
    first: int,
    labels: Sequence[str],
    family: GaugeMetricFamily | CounterMetricFamily,
) -> Metric:
    """The family with one sample for each of its second label's values, from `first` on."""
    for status in statuses:
        slots = status.values.get(section, ())[first : first + len(labels)]
        for label, number in zip(labels, slots, strict=False):
            family.add_metric([_engine(status), label], number)
    return family


def _control(statuses: Sequence[Status]) -> Iterator[Metric]:
    """What each engine holds itself to."""
    limits = GaugeMetricFamily(
        "shaper_power_limit_watts",
        "Power limit in force, by the window it is averaged over; of the engine's GPUs together.",
        labels=("engine", "window_seconds"),
    )
    ramp = GaugeMetricFamily(
        "shaper_ramp_limit_watts_per_second",
        "How much the mean power of 100 ms may rise within a second.",
        labels=("engine",),
    )
    mode = GaugeMetricFamily(
        "shaper_mode", "1 for the mode that the engine is in.", labels=("engine", "mode")
    )
    source = GaugeMetricFamily(
        "shaper_budget_source",
        "1 for what the budget in force comes from.",
        labels=("engine", "source"),
    )
    numbers = (
        CounterMetricFamily(
            "shaper_control_changes_total",
            "The last change of budget or mode that the engine has followed.",
            labels=("engine",),
        ),
        CounterMetricFamily(
            "shaper_control_refused_total",
            "Changes that the engine did not believe or could not follow.",
            labels=("engine",),
        ),
    )
    for status in statuses:
        engine, control = _engine(status), EngineControl.from_values(status.values["control"])
        if control is None:
            continue
        for limit in control.budget.limits:
            limits.add_metric([engine, f"{limit.window_seconds:g}"], limit.watts)
        if control.budget.ramp_watts_per_second is not None:
            ramp.add_metric([engine], control.budget.ramp_watts_per_second)
        for known in MODES:
            mode.add_metric([engine, known], float(known == control.mode))
        for each in Source:
            source.add_metric([engine, each.value], float(each is control.source))
        for family, number in zip(numbers, (control.taken_sequence, control.refused), strict=True):
            family.add_metric([engine], number)
    yield from (limits, ramp, mode, source, *numbers)


def _unkept(statuses: Sequence[Status]) -> Metric:
    family = GaugeMetricFamily(
        "shaper_limit_unkept",
        "1 where an operator's power limit is set and nobody keeps it, by why; 0 where it is "
        "kept, or none is set.",
        labels=("engine", "reason"),
    )
    for status in statuses:
        why = enforcement_of(status).unkept
        for reason in UNKEPT_REASONS:
            family.add_metric([_engine(status), reason], float(reason == why))
    return family


def _group(statuses: Sequence[Status]) -> Iterator[Metric]:
    """What each engine sees of its power group; no sample where it is in none."""
    limits = GaugeMetricFamily(
        "shaper_group_limit_watts",
        "Limit of the power group, by the window it is averaged over; of all its engines' GPUs.",
        labels=("engine", "group", "window_seconds"),
    )
    members = GaugeMetricFamily(
        "shaper_group_engines", "Engines of the group by state.", labels=("engine", "state")
    )
    for status in statuses:
        engine, group = _engine(status), GroupStatus.from_values(status.values.get("group", ()))
        if group is None:
            continue
        name = str(status.info.get("group", ""))
        for limit in group.limits:
            limits.add_metric([engine, name, f"{limit.window_seconds:g}"], limit.watts)
        for state in MEMBER_STATES:
            members.add_metric([engine, state], group.count(state))
    yield from (limits, members)
    yield from _table(statuses, "group", GROUP_METRICS)


def _degraded(statuses: Sequence[Status]) -> Metric:
    family = GaugeMetricFamily(
        "shaper_degraded_ratio",
        "What the GPUs give less than their state should give, by cause; 0: nothing.",
        labels=("engine", "cause"),
    )
    return _labelled(statuses, "standing", len(STANDING_METRICS), CAUSES, family)


def _released(statuses: Sequence[Status]) -> Metric:
    family = CounterMetricFamily(
        "shaper_flex_released_total",
        "Deferred flex requests that were let in, by why.",
        labels=("engine", "why"),
    )
    return _labelled(statuses, "flex", len(FLEX_METRICS), RELEASED, family)


def _refused(statuses: Sequence[Status], at_the_door: Mapping[tuple[str, str], int]) -> Metric:
    """At the door of the API servers, and in the engines at the bound of their wait."""
    family = CounterMetricFamily(
        "shaper_requests_refused_total",
        "Requests that were refused, by class of work and by why.",
        labels=("work_class", "reason"),
    )
    for kind, number in at_the_door.items():
        family.add_metric(kind, number)
    index = [name for name, _ in FLEX_METRICS].index("shaper_flex_refused_total")
    overdue = sum(s.values["flex"][index] for s in statuses if len(s.values["flex"]) > index)
    family.add_metric(("flex", "wait_exceeded"), overdue)
    return family


def _decisions(statuses: Sequence[Status]) -> Metric:
    family = CounterMetricFamily(
        "shaper_decisions_total",
        "Scheduler calls by why they got their limits.",
        labels=("engine", "reason"),
    )
    return _labelled(statuses, "scheduler", len(SCHEDULER_METRICS), REASONS, family)


def _parts(statuses: Sequence[Status]) -> Metric:
    family = CounterMetricFamily(
        "shaper_part_errors_total",
        "Failures of one part of the shaper, by part; the other parts went on.",
        labels=("engine", "part"),
    )
    return _labelled(statuses, "parts", 0, PARTS, family)


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
