"""What a study has found: summary.md, figures.json and report.html, from its folder alone."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import latency
from bench.harness.client import Replay
from bench.harness.decisions import read_decision_log
from bench.harness.latency import LatencyFigures, latency_figures
from bench.harness.page import tail_plots
from bench.harness.tables import latency_rows
from bench.studies.gpu.measure import PowerView, power_view, recording_model
from bench.studies.gpu.plan import WINDOW_SECONDS
from bench.studies.gpu.points import Point, between_steps
from bench.studies.gpu.store import DECISIONS, RECORDING, TRUE_POWER, RunMeta, read_run, write_json
from shaper.core.types import ClockEventReasons
from shaper.emulator.trace import read_power_trace
from shaper.errors import TraceError
from shaper.recording.format import Recording, read_recording
from shaper.report.html import Block, Plot, Section, definitions, paragraph, render
from shaper.report.power import LimitLine, PowerSeries, fine_power, window_power
from shaper.report.table import Heading, Row, Table, to_html, to_text
from shaper.traffic.figures import PowerFigures, grid_between, power_figures, window_means

NAN = float("nan")
REBUILT = (
    "A 100 ms mean is not measured: no reading resolves it. It is rebuilt from the recorded steps, "
    "each at the model's watts, times one ratio that makes the run's joules those of the energy "
    "counter. Measured are the counter (windows of 0.5 s and more) and the instant reading."
)
_POINT_COLUMNS: tuple[tuple[str, str, int, float], ...] = (
    ("W", "watts", 1, 1.0),
    ("W instant", "instant_watts", 1, 1.0),
    ("W average", "average_watts", 1, 1.0),
    ("ms/step", "step_seconds", 2, 1e3),
    ("J/step", "step_joules", 3, 1.0),
    ("tokens/J", "tokens_per_joule", 3, 1.0),
    ("busy", "busy_ratio", 2, 1.0),
    ("context", "mean_context_tokens", 0, 1.0),
    ("MHz", "sm_clock_hertz", 0, 1e-6),
    ("lowest", "lowest_sm_clock_hertz", 0, 1e-6),
    ("°C", "temperature_celsius", 0, 1.0),
)


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One server under the traffic."""

    meta: RunMeta
    recording: Recording
    replay: Replay
    view: PowerView
    power: PowerFigures
    """Of the rebuilt power."""
    latency: LatencyFigures
    true_peak_watts: float | None
    """Highest true 100 ms mean; of an emulated GPU only."""
    reasons: tuple[tuple[str, int], ...]
    """Decisions by reason, most frequent first."""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.meta.run.name


def run_figures(folder: Path, profile: str | None = None) -> RunFigures:
    """The figures of a finished server's run.

    Args:
        folder: of the run.
        profile: to predict with; None: the recording's own.

    Raises:
        TraceError: the run is not finished, or a file is broken.
        ConfigError: there is no such profile.
    """
    meta, replay = read_run(folder)
    recording = read_recording(folder / RECORDING)
    span = meta.started_seconds, meta.finished_seconds
    view = power_view(recording, recording_model(recording, profile), *span)
    log = read_decision_log(folder / DECISIONS)
    reasons = Counter(() if log is None else log.between(*span).reasons)
    true = folder / f"{TRUE_POWER}.rank0"
    return RunFigures(
        meta=meta,
        recording=recording,
        replay=replay,
        view=view,
        power=power_figures(view.grid, () if meta.limit is None else (meta.limit,)),
        latency=latency_figures(replay),
        true_peak_watts=power_figures(grid_between(read_power_trace(true), *span)).peak_watts
        if true.exists()
        else None,
        reasons=tuple(reasons.most_common()),
    )


def write_report(
    folder: Path,
    about: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    runs: Sequence[RunFigures],
) -> None:
    """Writes the three files.

    Args:
        folder: of the study.
        about: what was measured; `source` and `load` in words.
        stages: what the engine's stages have left, by name.
        runs: of the servers.

    Raises:
        TraceError: a stage is of another version.
    """
    title = f"The study of {about['source']}"
    points = "\n".join(_stage_lines(stages))
    parts = [f"# {title}", about["load"], points]
    sections = [Section("One engine, step by step", (Block(f"<pre>{html.escape(points)}</pre>"),))]
    if runs:
        table = servers_table(runs)
        parts += [f"## Servers under traffic\n\n{REBUILT}", to_text(table)]
        sections += [
            Section("Servers", (Block(to_html(table)), paragraph(REBUILT, "note"))),
            Section("Power", _power(runs)),
            Section("Latency", _latency(runs)),
        ]
    how = _how(about, stages, runs)
    parts.append("## How it was run\n\n" + "\n".join(f"- {name}: {text}" for name, text in how))
    sections.append(Section("How it was run", (definitions(how),)))
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    page = render(title, about["load"], sections)
    (folder / "report.html").write_text(page, encoding="utf-8")
    data = {
        **about,
        "between_steps": [asdict(each) for each in between_steps(_points(stages))],
        "runs": {run.name: as_data(run) for run in runs},
    }
    write_json(folder / "figures.json", data)


def as_data(run: RunFigures) -> dict[str, Any]:
    """The figures of a run as plain data."""
    return {
        "meta": asdict(run.meta),
        "power": asdict(run.power),
        "true_peak_watts": run.true_peak_watts,
        "highest_half_second_watts": _largest(run.view.measured_watts),
        "highest_instant_watts": _largest(run.view.instant_watts),
        "latency": asdict(run.latency),
        "prediction": {
            "decodes_alone": asdict(run.view.decodes),
            "with_prompts": asdict(run.view.prompts),
            "windows": asdict(run.view.windows),
            "joules_ratio": 1 / run.view.counter_ratio,
        },
        "reasons": dict(run.reasons),
    }


def _points(stages: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    try:
        return [Point(**point) for stage in stages.values() for point in stage["points"]]
    except TypeError as error:
        raise TraceError(f"a stage.json is of another version: {error}") from error


def _stage_lines(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The engine's stages as Markdown."""
    lines: list[str] = []
    names = ["load", *(column[0] for column in _POINT_COLUMNS), "clock events"]
    for name, stage in stages.items():
        unfinished = "" if stage["done"] else " (not finished)"
        lines += [f"## {name.capitalize()}{unfinished}", "", "| " + " | ".join(names) + " |"]
        lines += ["|---" * len(names) + "|"]
        for point in _points({name: stage}):
            cells = [_number(getattr(point, n), d, scale) for _, n, d, scale in _POINT_COLUMNS]
            held = ClockEventReasons(point.clock_event_reasons)
            events = ", ".join((e.name or "").lower() for e in ClockEventReasons if e & held)
            lines.append("| " + " | ".join([point.label(), *cells, events]) + " |")
        lines.append("")
        lines += [
            f"- {each.when}, batch {each.batch}: {each.gap_watts:.1f} W between steps "
            f"(standard error {_number(each.error_watts, 1)} W) at "
            f"{_number(each.temperature_celsius, 0)} °C, and {each.step_excess_joules:.3f} J a step"
            for each in between_steps(_points({name: stage}))
        ]
        lines.append(f"- the meter: {_words(stage['meter'])}")
        if stage["findings"].get("power_cap"):
            lines.append(f"- the step from rest: {_words(stage['findings']['power_cap'])}")
        if stage["read_errors"]:
            lines.append(f"- {stage['read_errors']} reads of the meter failed")
        lines += [*(f"- skipped: {why}" for why in stage["skipped"]), ""]
    return lines


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in values.items()
        if value is not None
    )


def _largest(values: Sequence[float] | np.ndarray[Any, Any]) -> float:
    return float(max(values)) if len(values) else NAN


def _tokens_per_joule(run: RunFigures) -> float:
    return run.latency.output_tokens / run.power.joules if run.power.joules else NAN


def _limit(run: RunFigures, field: str) -> float:
    return float(getattr(run.power.limits[0], field)) if run.power.limits else NAN


Figure = tuple[str, str, int, Callable[[RunFigures], float | None]]
"""Label, unit, digits, and the value of a run."""
_MEASURED: tuple[Figure | str, ...] = (
    "power, measured",
    ("mean, energy counter", "W", 1, lambda r: r.power.mean_watts),
    ("highest 0.5 s mean", "W", 1, lambda r: _largest(r.view.measured_watts)),
    ("highest instant reading", "W", 1, lambda r: _largest(r.view.instant_watts)),
    "power over 100 ms, rebuilt from the steps in the counter's watts",
    ("limit", "W", 1, lambda r: r.meta.limit.watts if r.meta.limit else None),
    ("highest mean", "W", 1, lambda r: r.power.peak_watts),
    ("highest mean, true (emulated only)", "W", 1, lambda r: r.true_peak_watts),
    ("windows above the limit", "%", 1, lambda r: 100 * _limit(r, "over_share")),
    ("worst window / limit", "", 3, lambda r: _limit(r, "worst_ratio")),
    "throughput and cost",
    ("output tokens per second", "1/s", 1, lambda r: r.latency.output_tokens_per_second),
    ("output tokens per joule", "1/J", 3, _tokens_per_joule),
    ("requests finished", "", 0, lambda r: r.latency.requests_finished),
    ("requests failed", "", 0, lambda r: r.latency.requests_failed),
    ("sent over 20 ms late", "", 0, lambda r: r.latency.late_sends),
    ("server's start", "s", 0, lambda r: r.meta.start_up_seconds),
    "as the client saw it",
)
_PREDICTED: tuple[Figure | str, ...] = (
    "the step model over what was measured",
    ("seconds of decodes alone: median error", "%", 1, lambda r: 100 * r.view.decodes.median_ratio),
    ("p90 of its size", "%", 1, lambda r: 100 * r.view.decodes.p90_absolute_ratio),
    ("seconds with prompts: median error", "%", 1, lambda r: 100 * r.view.prompts.median_ratio),
    ("p90 of its size", "%", 1, lambda r: 100 * r.view.prompts.p90_absolute_ratio),
    ("power over 0.5 s: median error", "%", 1, lambda r: 100 * r.view.windows.median_ratio),
    ("p90 of its size", "%", 1, lambda r: 100 * r.view.windows.p90_absolute_ratio),
    ("all joules, predicted over measured", "", 3, lambda r: 1 / r.view.counter_ratio),
)


def servers_table(runs: Sequence[RunFigures]) -> Table:
    """All servers side by side: power, cost, latency, and how far the step model was off."""

    def rows(figures: Sequence[Figure | str]) -> list[Row | Heading]:
        return [
            Heading(each)
            if isinstance(each, str)
            else Row(each[0], each[1], tuple(each[3](run) for run in runs), each[2])
            for each in figures
        ]

    latencies = latency_rows([run.latency for run in runs])
    every = (*rows(_MEASURED), *latencies, *rows(_PREDICTED))
    names = tuple(run.name for run in runs)
    return Table("the same traffic on each server", names, every, compare=False)


def _power(runs: Sequence[RunFigures]) -> tuple[Plot, ...]:
    all_series = []
    for run in runs:
        means = window_means(run.view.grid, WINDOW_SECONDS)
        all_series.append(
            PowerSeries(
                run.name,
                np.asarray(np.arange(len(means)) * 0.001 + WINDOW_SECONDS, dtype=np.float64),
                means,
                run.view.grid.watts,
                run.view.instant_times - run.view.grid.start_seconds,
                run.view.instant_watts,
            )
        )
    watts = sorted({run.meta.limit.watts for run in runs if run.meta.limit is not None})
    limits = [LimitLine(f"limit {each:.0f} W", each) for each in watts]
    return (
        Plot(
            "Rebuilt: mean power over 100 ms",
            window_power(all_series, limits),
            "From the recorded steps, in the energy counter's watts. The limits are on this curve.",
            420,
        ),
        Plot(
            "Rebuilt by the millisecond, and the instant reading",
            fine_power(all_series, ()),
            "Dots are what the meter said.",
            max(320, 190 * len(runs)),
        ),
    )


def _latency(runs: Sequence[RunFigures]) -> tuple[Plot, ...]:
    done = [latency.finished(run.replay) for run in runs]
    itl = [1e3 * latency.itl_seconds(records) for records in done]
    ttft = [1e3 * latency.ttft_seconds(records) for records in done]
    return tail_plots([run.name for run in runs], itl, ttft)


def _how(
    about: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    runs: Sequence[RunFigures],
) -> list[tuple[str, str]]:
    lines = [(name, _words(v) if isinstance(v, Mapping) else str(v)) for name, v in about.items()]
    lines += [(f"{name} stage", _words(stage["about"]["about"])) for name, stage in stages.items()]
    for run in runs:
        lines.append((f"{run.name} server", " ".join(run.meta.arguments)))
        lines.append((f"{run.name} ran", _words(run.meta.about)))
        words = ", ".join(f"{reason} {count}" for reason, count in run.reasons)
        lines.append((f"{run.name} decisions", words or "none"))
    return lines
