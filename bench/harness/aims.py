"""What a proof hands back: sections of a report, and the aims that they are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """One run, or a few that belong together: `call(*arguments)` in a process of a pool."""

    call: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


Results = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One row: its name and its figures; NaN: not measured, and not judged."""

    name: str
    figures: dict[str, float]


def cases(results: Sequence[dict[str, Any]]) -> tuple[Case, ...]:
    """Rows from what jobs returned: `name`, and figures by key."""
    return tuple(
        Case(each["name"], {key: value for key, value in each.items() if key != "name"})
        for each in results
    )


@dataclass(frozen=True, slots=True)
class Column:
    """One figure: its key in `Case.figures`, its heading, and how it is printed.

    An aim is a bound on `figures[key]`; `higher` says that more is better.
    """

    key: str
    heading: str
    digits: int = 2
    scale: float = 1.0
    aim: float | None = None
    higher: bool = False

    def text(self, case: Case) -> str:
        """The cell; `-` where nothing was measured."""
        value = case.figures.get(self.key, math.nan)
        return "-" if math.isnan(value) else f"{value * self.scale:,.{self.digits}f}"


@dataclass(frozen=True, slots=True)
class Section:
    """A table of cases, under a title, with what to know about it."""

    title: str
    columns: tuple[Column, ...]
    cases: tuple[Case, ...]
    note: str


class Proof(Protocol):
    """One part of a report; each module of `bench.acceptance` is one."""

    def jobs(self, quick: bool) -> list[Job]:
        """What is run; less if `quick`."""
        ...

    def sections(self, results: Results, quick: bool) -> list[Section]:
        """The tables of what the jobs returned, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """One aim, the worst case's figure, and whether it is met. NaN: not measured."""

    section: str
    figure: str
    aim: str
    worst: float
    worst_text: str
    case: str
    met: bool


def verdicts(section: Section) -> list[Verdict]:
    """Each aim of a section against the worst of its judged cases."""
    found = []
    for column in section.columns:
        if column.aim is None:
            continue
        cases = [
            case for case in section.cases if not math.isnan(case.figures.get(column.key, math.nan))
        ]
        if not cases:
            continue
        pick = min if column.higher else max
        worst = pick(cases, key=lambda case: case.figures[column.key])
        value = worst.figures[column.key]
        sign = ">=" if column.higher else "<="
        found.append(
            Verdict(
                section=section.title,
                figure=column.heading,
                aim=f"{sign} {column.aim * column.scale:,.{column.digits}f}",
                worst=value,
                worst_text=column.text(worst),
                case=worst.name,
                met=value >= column.aim if column.higher else value <= column.aim,
            )
        )
    return found


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table that also reads well on a terminal.

    The first row is the heading; the first column is left-aligned, the others right.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), "| " + " | ".join(rule) + " |", *map(line, rows[1:])])


def section_text(section: Section) -> str:
    """A section as Markdown."""
    heading = ["", *(column.heading for column in section.columns)]
    rows = [
        [case.name, *(column.text(case) for column in section.columns)] for case in section.cases
    ]
    return f"## {section.title}\n\n{aligned([heading, *rows])}\n\n{section.note}\n"


def verdict_text(found: Sequence[Verdict]) -> str:
    """All aims as one table, the worst case beside each."""
    rows = [["figure", "aim", "worst", "met", "in case"]]
    rows += [
        [f"{v.section}: {v.figure}", v.aim, v.worst_text, "met" if v.met else "MISSED", v.case]
        for v in found
    ]
    return aligned(rows)
