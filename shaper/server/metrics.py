"""The collector that shows what each engine says of itself on `/metrics`.

Names follow Prometheus: base units, `shaper_` prefix, `_total` for counters. See
`shaper/ipc/metric_table.py` for the metrics, and `shaper/ipc/engine_record.py` for how what
they show gets here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from shaper.ipc import metric_table
from shaper.ipc.engine_record import CHUNK_BUCKETS, Status


class StatusCollector(Collector):
    """Shows the status of a run's engines.

    Args:
        read: returns it; called once a scrape.
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
        for metric in metric_table.METRICS:
            yield _family(metric, statuses)
        yield _refused(statuses, self._refused())
        yield _chunks(statuses)


def _engine(status: Status) -> str:
    return str(status.info["engine"])


def _family(metric: metric_table.Metric, statuses: Sequence[Status]) -> Metric:
    kind = CounterMetricFamily if metric.name.endswith("_total") else GaugeMetricFamily
    family = kind(metric.name, metric.text, labels=("engine", *metric.labels))
    for status in statuses:
        shown = metric.get(status)
        numbers = shown if isinstance(shown, Mapping) else {(): shown}
        for labels, number in numbers.items():
            if number is not None and not math.isnan(number):
                values = (labels,) if isinstance(labels, str) else labels
                family.add_metric([_engine(status), *values], number)
    return family


def _refused(statuses: Sequence[Status], by_servers: Mapping[tuple[str, str], int]) -> Metric:
    """By the API servers, and by the engines at the bound of their wait."""
    family = CounterMetricFamily(
        "shaper_requests_refused_total",
        "Requests that were refused, by class of work and by why.",
        labels=("work_class", "reason"),
    )
    for kind, number in by_servers.items():
        family.add_metric(kind, number)
    overdue = sum(s.record.flex.refused for s in statuses if s.record.flex is not None)
    family.add_metric(("flex", "wait_exceeded"), overdue)
    return family


def _chunks(statuses: Sequence[Status]) -> Metric:
    family = HistogramMetricFamily(
        "shaper_prefill_chunk_tokens", "Prompt tokens in a step that had any.", labels=("engine",)
    )
    tops = [*(f"{top}" for top in CHUNK_BUCKETS), "+Inf"]
    for status in statuses:
        counters = status.record.counters
        if counters is None:
            continue
        buckets, running = [], 0
        for top, count in zip(tops, counters.chunks, strict=True):
            running += count
            buckets.append((top, running))
        family.add_metric([_engine(status)], buckets, counters.chunk_tokens)
    return family
