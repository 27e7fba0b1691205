"""Calendar time as spans of the wall clock: dated entries and daily ones.

A clock time that a change to or from daylight saving makes ambiguous or skips is read
as RFC 5545 (3.3.5) reads it: of two, the first; one that is skipped, with the offset
before the gap. So a daily span starts once a day and ends once, and one that lies
inside the gap has no length and is left out that day.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from shaper.core.budget import Span

MINUTES_OF_DAY = 24 * 60


def dated_span(start: datetime, end: datetime) -> Callable[[float], Span | None]:
    """The one span of an entry with `at` and `until`; both carry their zone."""
    span = Span(start.timestamp(), end.timestamp())
    return lambda wall_seconds: span if wall_seconds < span.end_seconds else None


def daily_spans(start_minute: int, end_minute: int, zone: tzinfo) -> Callable[[float], Span | None]:
    """The spans of a daily entry.

    Args:
        start_minute: of the day, 0 to 1439.
        end_minute: of the day, 0 to 1440; at or before the start, it is the next day's.
        zone: whose clock it goes by.
    """
    overnight = end_minute <= start_minute

    def next_span(wall_seconds: float) -> Span | None:
        today = datetime.fromtimestamp(wall_seconds, zone).date()
        # From yesterday, whose night may not be over, to tomorrow, and one day more each for a
        # span that a change of the clock swallows and for a date that a zone leaves out.
        for offset in range(-1, 4):
            day = today + timedelta(days=offset)
            start = _at(day, start_minute, zone)
            end = _at(day + timedelta(days=overnight), end_minute, zone)
            if end > start and end > wall_seconds:
                return Span(start, end)
        return None

    return next_span


def _at(day: date, minute: int, zone: tzinfo) -> float:
    days, minute = divmod(minute, MINUTES_OF_DAY)
    clock = time(minute // 60, minute % 60, tzinfo=zone)
    return datetime.combine(day + timedelta(days=days), clock).timestamp()


def days_overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two daily entries, as start and end minute of the day, ever hold at once."""
    return any(
        (later - start) % MINUTES_OF_DAY < ((end - start) % MINUTES_OF_DAY or MINUTES_OF_DAY)
        for (start, end), (later, _) in ((one, other), (other, one))
    )


def iso(wall_seconds: float) -> str:
    """A wall time as people and machines read it: `2026-11-25T07:30:00Z`."""
    text = datetime.fromtimestamp(wall_seconds, UTC).isoformat(timespec="seconds")
    return text.replace("+00:00", "Z")
