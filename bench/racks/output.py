"""What a comparison prints and writes: text, Markdown, JSON, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness.aims import Verdict, section_text, verdict_text, verdicts
from bench.harness.machine import describe
from bench.harness.runner import Told
from bench.harness.tables import without_nan
from bench.racks.outcome import Outcome
from bench.racks.page import rack_page
from bench.racks.plan import Comparison
from bench.racks.rows import TRIED_COLUMNS, Entry, Reference, aimed, figures, table
from shaper.engine.compat import vllm_version
from shaper.errors import ConfigError
from shaper.simulate.show import setup_dict

TITLE = "A rack under a power limit"


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison that is over, and how it was run."""

    comparison: Comparison
    traffic: str
    rate_hertz: float
    notes: tuple[str, ...]
    ledger_lines: tuple[str, ...]
    """What a decision costs by the number of engines."""
    runs: tuple[Told, ...]
    seconds: float

    @property
    def verdicts(self) -> list[Verdict]:
        """The aims that there are rows for."""
        found = self.comparison
        return [
            each for section in aimed(found.entries, found.references) for each in verdicts(section)
        ]

    @property
    def about(self) -> list[tuple[str, str]]:
        """Names and values of the setup."""
        found, rack = self.comparison, self.comparison.rack
        fresh = [told for told in self.runs if not told.kept]
        simulated = sum(x.outcome.engines * x.outcome.duration_seconds for x in fresh)
        busy = sum(x.outcome.wall_seconds for x in fresh)
        speed = f"{simulated / busy:.1f} engine-seconds a second and core" if busy else "all kept"
        gpus = f" x {rack.tensor_parallel}" if rack.tensor_parallel > 1 else ""
        return [
            ("rack", f"{rack.engines} engines of {rack.model} on {rack.gpu}{gpus}"),
            (
                "traffic",
                f"{self.traffic}, {self.rate_hertz:g} requests/s an engine, router {rack.router}, "
                f"{rack.duration_seconds:g} s with {rack.warm_up_seconds:.3g} s of warm-up",
            ),
            ("seeds", ", ".join(map(str, found.seeds))),
            (
                "unshaped peaks of 100 ms",
                ", ".join(f"{x.unshaped.peak_watts:,.0f} W" for x in found.references.values()),
            ),
            ("machine", f"{describe()}; vLLM {vllm_version()}"),
            ("runs", f"{len(self.runs)}, {len(self.runs) - len(fresh)} of them kept from before"),
            ("speed", f"{speed}; {self.seconds:.0f} s in all"),
            ("date", datetime.now(UTC).date().isoformat()),
        ]


def text_of(report: Report) -> str:
    """Everything as Markdown that reads well on a terminal."""
    found = report.comparison
    parts = [
        "\n".join(f"{name}: {value}" for name, value in report.about),
        *report.notes,
        section_text(table("Figures", found.entries, found.references, found.columns)),
    ]
    if report.verdicts:
        parts.append(f"## Aims\n\n{verdict_text(report.verdicts)}\n")
    if found.tried:
        parts.append(
            section_text(
                table("What the searches tried", found.tried, found.references, TRIED_COLUMNS)
            )
        )
    if report.ledger_lines:
        parts.append("## Cost of a decision\n\n" + "\n".join(report.ledger_lines) + "\n")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def data_of(report: Report) -> dict[str, Any]:
    """Everything as plain data; what was not measured is null."""
    found = report.comparison
    data = {
        "setup": setup_dict(found.rack),
        "about": dict(report.about),
        "notes": report.notes,
        "references": {
            str(seed): {
                "unshaped": _plain(x.unshaped),
                "small": None if x.small is None else _plain(x.small),
            }
            for seed, x in found.references.items()
        },
        "rows": [_row(x, found.references[x.seed]) for x in found.entries],
        "tried": [_row(x, found.references[x.seed]) for x in found.tried],
        "aims": [asdict(each) for each in report.verdicts],
        "cost_of_a_decision": report.ledger_lines,
        "runs": [
            {
                "name": x.name,
                "engine_seconds_per_second": x.outcome.engine_seconds_per_second,
                "wall_seconds": x.outcome.wall_seconds,
                "ledger_microseconds_per_decision": x.outcome.ledger_microseconds,
                "kept": x.kept,
            }
            for x in report.runs
        ],
    }
    plain: dict[str, Any] = without_nan(data)
    return plain


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        each.name: getattr(outcome, each.name) for each in fields(outcome) if each.name != "arrays"
    }


def _row(entry: Entry, reference: Reference) -> dict[str, Any]:
    return {
        "policy": entry.policy,
        "detail": entry.detail,
        "seed": entry.seed,
        **figures(entry, reference),
        "run": None if entry.outcome is None else _plain(entry.outcome),
    }


def write(report: Report, folder: Path, copy: Path | None) -> str:
    """Write the report, the table and the figures.

    Args:
        folder: exists.
        copy: of the figures.

    Returns:
        The text, with where the rest lies.

    Raises:
        ConfigError: a file can't be written.
    """
    text = text_of(report)
    data = json.dumps(data_of(report), indent=1) + "\n"
    lead = (
        "vLLM's own scheduler and KV cache over emulated GPUs in virtual time, the same traffic "
        "for every row. Losses stand beside gains."
    )
    files = {
        folder / "table.md": text,
        folder / "figures.json": data,
        folder / "report.html": rack_page(
            TITLE, lead, report.comparison, report.about, (*report.notes, *report.ledger_lines)
        ),
    }
    if copy is not None:
        files[copy] = data
    _write_all(files)
    return f"{text}\n{folder / 'report.html'}, table.md and figures.json are in {folder}"


def _write_all(files: dict[Path, str]) -> None:
    for path, content in files.items():
        try:
            path.write_text(content)
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error}") from error


def check_writable(paths: Sequence[Path | None]) -> None:
    """Say before minutes of running that a file can't be written.

    Raises:
        ConfigError: its folder is not there, or it is a folder itself.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{path} can't be written: a folder, or in none that is there")
