"""Tables of text: rows of CSV with whatever separator, and numbers as spreadsheets write them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass

from shaper.files.text import Lines, shown

_SEPARATORS = ",;\t|"
# Whole numbers that a float holds exactly: what another program wrote as 12.0 is 12.
MAX_WHOLE = 2**53


@dataclass(frozen=True, slots=True)
class Header:
    """The first row, and what separates its cells. Names are as `key` makes them."""

    names: tuple[str, ...]
    separator: str

    def places(self, wanted: tuple[str, ...]) -> tuple[int, ...]:
        """Where these columns stand; shorter where one is missing."""
        return tuple(self.names.index(key(name)) for name in wanted if key(name) in self.names)


def key(name: object) -> str:
    """A column's name without case, spaces and underscores: `Request tokens`, `request_tokens`."""
    return "".join(each for each in str(name).casefold() if each not in " _\t\r\n\ufeff\"'")


def read_header(lines: Lines) -> Header | None:
    """The first line that holds anything, as a header; None where there is none.

    Raises:
        TraceError: it is no row, or names a column twice.
    """
    line = next((line for line in lines if line.strip()), None)
    if line is None:
        return None
    try:
        rows = [(next(csv.reader([line], delimiter=each), []), each) for each in _SEPARATORS]
    except csv.Error as error:
        raise lines.error(f"no header of a table ({error})") from error
    cells, separator = max(rows, key=lambda row: len(row[0]))
    while cells and not cells[-1].strip():
        cells.pop()
    names = tuple(key(cell) for cell in cells)
    twice = next((cell for cell, name in zip(cells, names, strict=True)
                  if name and names.count(name) > 1), None)  # fmt: skip
    if twice is not None:
        raise lines.error(f"column {shown(twice.strip())} is named twice: take one out")
    return Header(names, separator)


def read_rows(lines: Lines, header: Header) -> Iterator[tuple[list[str], bool]]:
    """The rows after the header, cells stripped, blank rows left out; and whether the row is
    whole: not one that a kill has cut off.

    A row may have fewer cells than the header, as spreadsheets leave out empty ones at its end.

    Raises:
        TraceError: a row is no CSV, or has more cells than the header.
    """
    ended = True

    def watched() -> Iterator[str]:
        nonlocal ended
        for line in lines:
            ended = line.endswith(("\n", "\r"))
            yield line

    count = len(header.names)
    reader = csv.reader(watched(), delimiter=header.separator, skipinitialspace=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            what = str(error)
            if "field limit" in what:
                what = (
                    f"a cell is over {csv.field_size_limit():,} characters long; is a quote open?"
                )
            raise lines.error(f"no row of a table: {what}") from error
        if row is None:
            return
        cells = [cell.strip() for cell in row]
        while len(cells) > count and not cells[-1]:
            cells.pop()
        if any(cells):
            if len(cells) > count:
                raise lines.error(f"{len(cells)} columns, the header has {count}")
            yield cells, ended or len(cells) == count


def whole_number(value: object) -> int:
    """A whole number: `374`, `374.0`, `1e3`.

    Raises:
        ValueError: it is none, or too large to be one; the message goes on after `it is`.
    """
    number = float_number(value)
    if not number.is_integer() or abs(number) > MAX_WHOLE:
        raise ValueError(f"{shown(value)}, not a whole number")
    return int(number)


def float_number(value: object) -> float:
    """A finite number.

    Raises:
        ValueError: it is none; the message goes on after `it is`.
    """
    if value == "":
        raise ValueError("empty")
    if isinstance(value, bool | None) or not isinstance(value, str | int | float):
        raise ValueError(f"{shown(value)}, not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    # Python takes 1_000 for a number; no other program writes it.
    if not math.isfinite(number) or (isinstance(value, str) and "_" in value):
        hint = ""
        if isinstance(value, str) and _number_or_nan(value.replace(",", "")):
            hint = ": write it with a point and without thousands separators"
        raise ValueError(f"{shown(value)}, not a number{hint}")
    return number


def _number_or_nan(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False
