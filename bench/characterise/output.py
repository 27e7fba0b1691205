"""Where a run's results go: the recording, the points as JSON, and a summary to read."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.characterise.plan import STAGES
from bench.characterise.points import Point, between_steps
from shaper.core.types import ClockEventReasons


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What is left to write at the end."""

    meta: Mapping[str, Any]
    points: Sequence[Point]
    findings: Mapping[str, Any]
    skipped: Sequence[str]
    seconds: float
    interrupted: bool
    read_errors: int


@dataclasses.dataclass(frozen=True, slots=True)
class Files:
    """The files of one run; one stage alone does not overwrite those of another."""

    recording: Path
    points: Path
    summary: Path


def files_in(folder: Path, stage: str) -> Files:
    """The files of a run of `stage`, or of `all`. Parquet needs pyarrow, CSV nothing."""
    tail = "" if stage == "all" else f"-{stage}"
    suffix = ".parquet" if importlib.util.find_spec("pyarrow") else ".csv"
    return Files(
        recording=folder / f"recording{tail}{suffix}",
        points=folder / f"points{tail}.json",
        summary=folder / f"summary{tail}.md",
    )


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """What the JSON file holds."""
    points = [
        dataclasses.asdict(point)
        | {"step_joules": point.step_joules, "tokens_per_joule": point.tokens_per_joule}
        for point in outcome.points
    ]
    between = [dataclasses.asdict(found) for found in between_steps(outcome.points)]
    found: dict[str, Any] = _finite(
        {
            "meta": dict(outcome.meta),
            "seconds": outcome.seconds,
            "interrupted": outcome.interrupted,
            "read_errors": outcome.read_errors,
            "skipped": list(outcome.skipped),
            "points": points,
            "between_steps": between,
            "findings": dict(outcome.findings),
        }
    )
    return found


def write(outcome: Outcome, files: Files) -> None:
    """Writes the points and the summary; the recording is written as it grows."""
    files.points.write_text(json.dumps(as_dict(outcome), indent=1) + "\n")
    files.summary.write_text(summary(outcome, files))


def summary(outcome: Outcome, files: Files) -> str:
    """The results as Markdown."""
    meta = outcome.meta
    lines = [
        f"# {meta.get('device', 'GPU')}: power and time of steps",
        "",
        f"{meta.get('model', 'model')}, dummy weights; {_words(meta.get('about', {}))}.",
        f"The run took {outcome.seconds:.0f} s"
        + (" and was interrupted." if outcome.interrupted else ".")
        + (f" {outcome.read_errors} reads of the meter failed." if outcome.read_errors else ""),
    ]
    for stage in STAGES:
        mine = [point for point in outcome.points if point.stage == stage]
        if mine:
            lines += ["", f"## {stage.capitalize()}", "", *_table(mine)]
        lines += _found_of(stage, outcome)
    if outcome.skipped:
        lines += ["", "## Skipped", "", *(f"- {what}" for what in outcome.skipped)]
    lines += ["", f"A profile of it: `shaper fit {files.recording.name} --output profile.toml`", ""]
    return "\n".join(lines)


def _table(points: Sequence[Point]) -> list[str]:
    head = (
        *("load", "W", "W instant", "W average", "ms/step", "J/step", "tokens/J", "busy"),
        *("context", "MHz", "lowest", "°C", "clock events"),
    )
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for point in points:
        cells = (
            point.label(),
            _number(point.watts, 1),
            _number(point.instant_watts, 1),
            _number(point.average_watts, 1),
            _number(point.step_seconds, 2, 1e3),
            _number(point.step_joules, 3),
            _number(point.tokens_per_joule, 3),
            f"{point.busy_ratio:.0%}",
            _number(point.mean_context_tokens, 0),
            _number(point.sm_clock_hertz, 0, 1e-6),
            _number(point.lowest_sm_clock_hertz, 0, 1e-6),
            _number(point.temperature_celsius, 0),
            _reasons(point.clock_event_reasons),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _found_of(stage: str, outcome: Outcome) -> list[str]:
    """What the points of a stage say together."""
    lines: list[str] = []
    if stage == "cadence":
        for found in between_steps(outcome.points):
            lines += [
                "",
                f"Between steps of batch {found.batch} the GPU draws {found.gap_watts:.1f} W "
                f"(standard error {found.error_watts:.1f} W), and a step takes "
                f"{found.step_excess_joules:.3f} J above that level.",
            ]
    if stage == "meter":
        for one in outcome.findings.get("meter", []):
            lines += ["", f"`{one['reading']}`: {_words(one, leave_out='reading')}."]
        cap = outcome.findings.get("power_cap")
        if cap:
            lines += ["", f"Power cap under the heaviest load: {_words(cap)}."]
    if stage == "reads":
        for name, title in (("reads", "Reads"), ("reads_under_load", "Reads beside decode steps")):
            lines += _costs(title, outcome.findings.get(name, []))
    return lines


def _costs(title: str, costs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not costs:
        return []
    head = "| read | median ms | p99 ms | longest ms |"
    lines = ["", f"## {title}", "", head, "|---" * 4 + "|"]
    for cost in costs:
        numbers = (cost["median_seconds"], cost["p99_seconds"], cost["longest_seconds"])
        cells = [_number(seconds, 3, 1e3) for seconds in numbers]
        if cost["error"]:
            cells = [cost["error"], "", ""]
        lines.append(f"| {cost['name']} | " + " | ".join(cells) + " |")
    return lines


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def _words(values: Mapping[str, Any], leave_out: str = "") -> str:
    parts = []
    for name, value in values.items():
        if name == leave_out or value is None:
            continue
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)


def _reasons(bits: int) -> str:
    held = ClockEventReasons(bits)
    return ", ".join((one.name or "").lower() for one in ClockEventReasons if one & held)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
