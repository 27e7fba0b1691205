"""Tables as text and as HTML."""

from __future__ import annotations

import math

import pytest

from shaper.report.table import (
    Heading,
    Row,
    Table,
    format_value,
    is_worse,
    ratio_of,
    to_html,
    to_text,
)

TABLE = Table(
    "t",
    ("a", "b"),
    (
        Heading("power"),
        Row("peak", "W", (640.0, 544.0), 1, "lower"),
        Row("p99 <ITL>", "ms", (10.0, 11.0), 2, "lower"),
        Row("tokens", "1/s", (1000.0, 1000.0), 0, "higher"),
        Row("failed", "", (0.0, 3.0), 0, "lower"),
        Row("none", "", (None, math.nan), 0),
    ),
)


def test_text_is_an_aligned_markdown_table() -> None:
    """All lines are equally long; the ratio is the last run over the first."""
    lines = to_text(TABLE).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["|", "figure", "|", "unit", "|", "a", "|", "b", "|", "ratio", "|"]
    assert lines[3].split("|")[3:6] == [" 640.0 ", " 544.0 ", " 0.850 "]
    assert lines[7].split("|")[5].strip() == "-"


def test_a_single_run_has_no_ratio() -> None:
    """One run: no column of ratios."""
    assert "ratio" not in to_text(Table("t", ("a",), (Row("x", "s", (1.0,)),)))


def test_html_is_escaped_and_marks_what_got_worse() -> None:
    """Text can't become markup; only the worse row is marked."""
    text = to_html(TABLE)
    assert "&lt;ITL&gt;" in text
    assert "<ITL>" not in text
    assert text.count('class="worse"') == 1


@pytest.mark.parametrize(
    ("row", "worse"),
    [
        (Row("x", "", (100.0, 101.0), better="lower"), False),
        (Row("x", "", (100.0, 101.5), better="lower"), True),
        (Row("x", "", (100.0, 98.5), better="higher"), True),
        (Row("x", "", (100.0, 150.0), better="higher"), False),
        (Row("x", "", (100.0, 150.0)), False),
        (Row("x", "", (0.0, 150.0), better="lower"), False),
        (Row("x", "", (100.0, None), better="lower"), False),
    ],
)
def test_worse_is_in_the_wrong_direction_by_over_one_percent(row: Row, worse: bool) -> None:
    """Direction decides, and a row without one is never worse."""
    assert is_worse(row) is worse


def test_ratio_is_left_out_where_it_means_nothing() -> None:
    """No ratio over 0, of a missing value, or of a row that asks for none."""
    assert ratio_of(Row("x", "", (2.0, 3.0))) == pytest.approx(1.5)
    assert ratio_of(Row("x", "", (0.0, 3.0))) is None
    assert ratio_of(Row("x", "", (2.0, math.nan))) is None
    assert ratio_of(Row("x", "", (2.0, 3.0), ratio=False)) is None


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1234567.891, 1, "1,234,567.9"),
        (-0.001, 2, "0.00"),
        (-1.5, 1, "-1.5"),
        (None, 1, "-"),
        (math.nan, 1, "-"),
    ],
)
def test_numbers(value: float | None, digits: int, text: str) -> None:
    """Thousands separators, no negative zero, a dash for what is missing."""
    assert format_value(value, digits) == text
