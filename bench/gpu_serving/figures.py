"""The figures of one run, measured or in virtual time, and tables of several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu_serving.measure import PowerView, largest, power_view, recording_model
from bench.gpu_serving.store import DECISIONS, TRUE_POWER, RunMeta, StoredRun, read_run
from bench.harness.decisions import read_decision_log
from bench.harness.latency import LatencyFigures, latency_figures
from shaper.emulator.trace import read_power_trace
from shaper.report.table import Better, Heading, Row, Table
from shaper.traffic.figures import PowerFigures, grid_between, power_figures

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One run."""

    stored: StoredRun
    view: PowerView
    power: PowerFigures
    """Of the rebuilt power."""
    latency: LatencyFigures
    true_peak_watts: float | None
    """Highest true 100 ms mean; of an emulated GPU only."""
    reasons: tuple[tuple[str, int], ...]
    """Decisions by reason, most frequent first."""

    @property
    def meta(self) -> RunMeta:
        """What is known of the run."""
        return self.stored.meta

    @property
    def name(self) -> str:
        """Of the run."""
        return self.meta.run.name


def run_figures(folder: Path, profile: str | None = None) -> RunFigures:
    """The figures of a finished run.

    Args:
        folder: of the run.
        profile: to predict with; None: the recording's own.

    Raises:
        TraceError: the run is not finished, or a file is broken.
        ConfigError: there is no such profile.
    """
    stored = read_run(folder)
    meta = stored.meta
    model = recording_model(stored.recording, profile)
    view = power_view(stored.recording, model, meta.started_seconds, meta.finished_seconds)
    limits = () if meta.limit is None else (meta.limit,)
    log = read_decision_log(folder / DECISIONS)
    reasons: Counter[str] = Counter()
    if log is not None:
        reasons.update(log.between(meta.started_seconds, meta.finished_seconds).reasons)
    return RunFigures(
        stored=stored,
        view=view,
        power=power_figures(view.grid, limits),
        latency=latency_figures(stored.replay),
        true_peak_watts=_true_peak(folder, meta),
        reasons=tuple(reasons.most_common()),
    )


def _true_peak(folder: Path, meta: RunMeta) -> float | None:
    path = folder / f"{TRUE_POWER}.rank0"
    if not path.exists():
        return None
    grid = grid_between(read_power_trace(path), meta.started_seconds, meta.finished_seconds)
    return power_figures(grid).peak_watts


def _limit(run: RunFigures, value: Callable[[Any], float]) -> float:
    return value(run.power.limits[0]) if run.power.limits else NAN


def _watts_limit(run: RunFigures) -> float:
    return NAN if run.meta.limit is None else run.meta.limit.watts


def measured_table(found: Sequence[RunFigures]) -> Table:
    """All runs side by side."""

    def row(
        label: str,
        unit: str,
        value: Callable[[RunFigures], float | None],
        digits: int = 1,
        better: Better | None = None,
    ) -> Row:
        return Row(label, unit, tuple(value(run) for run in found), digits, better)

    return Table(
        "the same traffic on each server",
        tuple(run.name for run in found),
        (
            Heading("power, measured"),
            row("mean, energy counter", "W", lambda r: r.power.mean_watts),
            row(
                "highest 0.5 s mean, energy counter", "W", lambda r: largest(r.view.measured_watts)
            ),
            row("highest instant reading", "W", lambda r: largest(r.view.instant_watts)),
            Heading("power, rebuilt from the steps in the counter's watts"),
            row("limit over 100 ms", "W", _watts_limit),
            row("highest 100 ms mean", "W", lambda r: r.power.peak_watts),
            row("highest 100 ms mean, true (emulated only)", "W", lambda r: r.true_peak_watts),
            row(
                "windows above the limit", "%", lambda r: 100 * _limit(r, lambda x: x.over_share), 3
            ),
            row("worst window / limit", "", lambda r: _limit(r, lambda x: x.worst_ratio), 3),
            Heading("latency, as the client saw it"),
            *latency_rows(row),
            Heading("throughput and cost"),
            row("output tokens", "1/s", lambda r: r.latency.output_tokens_per_second),
            row("output tokens per joule", "1/J", _tokens_per_joule, 3),
            row("requests finished", "", lambda r: float(r.latency.requests_finished), 0),
            row("requests failed", "", lambda r: float(r.latency.requests_failed), 0),
            row("sent over 20 ms late", "", lambda r: float(r.latency.late_sends), 0),
            row("server's start", "s", lambda r: r.meta.start_up_seconds, 0),
        ),
        compare=False,
    )


def latency_rows(row: Callable[..., Row]) -> list[Row]:
    """p50 and p99 of TTFT, ITL and end-to-end latency."""
    found = []
    for label, field, digits in (
        ("TTFT", "ttft_seconds", 0),
        ("ITL", "itl_seconds", 1),
        ("end-to-end", "e2el_seconds", 0),
    ):
        for level in ("p50", "p99"):

            def value(run: RunFigures, field: str = field, level: str = level) -> float:
                return 1e3 * float(getattr(getattr(run.latency, field), level))

            found.append(row(f"{label} {level}", "ms", value, digits))
    return found


def _tokens_per_joule(run: RunFigures) -> float:
    return run.latency.output_tokens / run.power.joules if run.power.joules else NAN


def prediction_table(found: Sequence[RunFigures]) -> Table:
    """The step model beside what was measured, over the very steps that ran."""

    def row(label: str, unit: str, value: Callable[[RunFigures], float], digits: int = 1) -> Row:
        return Row(label, unit, tuple(value(run) for run in found), digits)

    def windows(run: RunFigures, level: float) -> float:
        errors = abs(run.view.window_errors)
        return 100 * float(sorted(errors)[int(level * (len(errors) - 1))]) if len(errors) else NAN

    rows: list[Row | Heading] = [
        Heading("seconds of steps, predicted over measured"),
        row("steps", "", lambda r: float(r.view.step_errors().steps), 0),
    ]
    for label, prompts in (("decodes alone", False), ("with prompts", True)):
        errors = [run.view.step_errors(prompts) for run in found]
        middle = tuple(100 * error.median_ratio for error in errors)
        tail = tuple(100 * error.p90_absolute_ratio for error in errors)
        rows += [
            Row(f"{label}: median error", "%", middle, 1),
            Row(f"{label}: p90 of the error's size", "%", tail, 1),
        ]
    rows += [
        Heading("power, in windows of 0.5 s of the energy counter"),
        row("windows", "", lambda r: float(len(r.view.measured_watts)), 0),
        row("median size of the error", "%", lambda r: windows(r, 0.5)),
        row("p90 of the error's size", "%", lambda r: windows(r, 0.9)),
        row("all joules, predicted over measured", "", lambda r: 1 / r.view.counter_ratio, 3),
    ]
    names = dict.fromkeys(kind.name for run in found for kind in run.view.kinds)
    if names:
        rows.append(Heading("measured over predicted power, by kind (± a standard error)"))
    for name in names:
        rows += [
            Row(name, "", tuple(_kind(run, name, "ratio") for run in found), 3),
            Row(f"± {name}", "", tuple(_kind(run, name, "error") for run in found), 3),
        ]
    return Table(
        "predicted and measured", tuple(run.name for run in found), tuple(rows), compare=False
    )


def _kind(run: RunFigures, name: str, field: str) -> float:
    return next((float(getattr(k, field)) for k in run.view.kinds if k.name == name), NAN)


def virtual_table(pairs: Sequence[tuple[RunFigures, RunFigures]]) -> Table:
    """Measured and virtual runs; the ratio is virtual over measured."""
    rows: list[Row | Heading] = []
    for pair in pairs:

        def row(
            label: str,
            unit: str,
            value: Callable[[RunFigures], float],
            digits: int = 1,
            pair: tuple[RunFigures, RunFigures] = pair,
        ) -> Row:
            return Row(label, unit, tuple(value(run) for run in pair), digits)

        limits = [_watts_limit(run) for run in pair]
        title = pair[0].name
        if not math.isnan(limits[0]):
            title += f": limit {limits[0]:.0f} W on the server, {limits[1]:.0f} W in virtual time"
        rows += [
            Heading(title),
            row("mean power", "W", lambda r: r.power.mean_watts),
            row(
                "highest 0.5 s mean, energy counter", "W", lambda r: largest(r.view.measured_watts)
            ),
            row("highest instant reading", "W", lambda r: largest(r.view.instant_watts)),
            row("highest 100 ms mean, rebuilt", "W", lambda r: r.power.peak_watts),
            row("median step", "ms", _median_step, 2),
            row("steps", "", lambda r: float(len(r.view.step_measured_seconds)), 0),
            *latency_rows(row),
            row("output tokens per joule", "1/J", _tokens_per_joule, 3),
        ]
    return Table("measured and in virtual time", ("measured", "virtual time"), tuple(rows))


def _median_step(run: RunFigures) -> float:
    seconds = run.view.step_measured_seconds
    return 1e3 * float(sorted(seconds)[len(seconds) // 2]) if len(seconds) else NAN


def as_data(run: RunFigures) -> dict[str, Any]:
    """The figures as plain data."""
    return {
        "meta": asdict(run.meta),
        "power": asdict(run.power),
        "true_peak_watts": run.true_peak_watts,
        "highest_half_second_watts": largest(run.view.measured_watts),
        "highest_instant_watts": largest(run.view.instant_watts),
        "latency": asdict(run.latency),
        "prediction": {
            "decodes_alone": asdict(run.view.step_errors(False)),
            "with_prompts": asdict(run.view.step_errors(True)),
            "joules_ratio": 1 / run.view.counter_ratio,
            "kinds": [asdict(kind) for kind in run.view.kinds],
        },
        "reasons": dict(run.reasons),
    }
