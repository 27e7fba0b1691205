"""A table of figures of several runs, as aligned text and as HTML."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]
MISSING = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of every run. None or NaN: not measured.

    `better` says which direction is good; None where neither is. A row without
    `ratio` has a figure whose quotient means nothing, such as a count near 0.
    """

    label: str
    unit: str
    values: tuple[float | None, ...]
    digits: int = 1
    better: Better | None = None
    ratio: bool = True


@dataclass(frozen=True, slots=True)
class Heading:
    """A line above a group of rows."""

    label: str


@dataclass(frozen=True, slots=True)
class Table:
    """Figures side by side; the first run is what the last one is compared with."""

    title: str
    runs: tuple[str, ...]
    rows: tuple[Row | Heading, ...]
    compare: bool = True
    """False: the columns are no runs of the same thing, and their ratio means nothing."""

    @property
    def compares(self) -> bool:
        """Whether there is a column for the ratio."""
        return self.compare and len(self.runs) > 1


def format_value(value: float | None, digits: int) -> str:
    """A number with thousands separators, `-` where there is none."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def ratio_of(row: Row) -> float | None:
    """Last run's value over the first's; None where that means nothing."""
    first, last = row.values[0], row.values[-1]
    if not row.ratio or len(row.values) < 2 or first is None or last is None:
        return None
    if math.isnan(first) or math.isnan(last) or first == 0:
        return None
    return last / first


def format_ratio(ratio: float | None) -> str:
    """A ratio to three decimals, `-` where there is none."""
    return MISSING if ratio is None else f"{ratio:.3f}"


def is_worse(row: Row) -> bool:
    """Whether the last run is worse than the first by more than 1%."""
    ratio = ratio_of(row)
    if ratio is None or row.better is None:
        return False
    return ratio > 1.01 if row.better == "lower" else ratio < 0.99


def _cells(table: Table, row: Row) -> list[str]:
    cells = [row.label, row.unit, *(format_value(v, row.digits) for v in row.values)]
    if table.compares:
        cells.append(format_ratio(ratio_of(row)))
    return cells


def _header(table: Table) -> list[str]:
    header = ["figure", "unit", *table.runs]
    return [*header, "ratio"] if table.compares else header


def to_text(table: Table) -> str:
    """The table as aligned text that is also a Markdown table."""
    header = _header(table)
    body = [
        [row.label, *[""] * (len(header) - 1)] if isinstance(row, Heading) else _cells(table, row)
        for row in table.rows
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    rule = ["-" * widths[i] if i < 2 else "-" * (widths[i] - 1) + ":" for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [header, rule, *body]
    ]
    return "\n".join(lines)


def to_html(table: Table) -> str:
    """The table as an HTML element; a figure that got worse is marked in words too."""
    header = _header(table)
    head = "".join(
        f'<th scope="col"{"" if i < 2 else " class=n"}>{html.escape(cell)}</th>'
        for i, cell in enumerate(header)
    )
    body = []
    for row in table.rows:
        if isinstance(row, Heading):
            label = html.escape(row.label)
            body.append(f'<tr class=h><th colspan="{len(header)}">{label}</th></tr>')
            continue
        cells = _cells(table, row)
        numbers = "".join(f"<td class=n>{html.escape(cell)}</td>" for cell in cells[2:])
        mark = (
            ' class="worse" title="worse than the first run"'
            if table.compares and is_worse(row)
            else ""
        )
        body.append(
            f'<tr{mark}><th scope="row">{html.escape(cells[0])}</th>'
            f"<td>{html.escape(cells[1])}</td>{numbers}</tr>"
        )
    return (
        f'<div class="scroll"><table aria-label="{html.escape(table.title)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
