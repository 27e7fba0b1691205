"""The schedule of budgets as an operator writes it: dated entries and daily ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, tzinfo
from itertools import combinations
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import model_validator

from shaper.config.budget import Moment, TermsConfig
from shaper.config.calendar_spans import MINUTES_OF_DAY, daily_spans, dated_span, days_overlap
from shaper.config.suggest import suggest
from shaper.core.budget import BudgetTerms, ScheduledTerms


def _clock_minute(text: str) -> int | None:
    match = re.fullmatch(r"\s*(\d{1,2}):(\d{2})\s*", text)
    if match is None or int(match[2]) > 59:
        return None
    minute = int(match[1]) * 60 + int(match[2])
    return minute if minute <= MINUTES_OF_DAY else None


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        known = available_timezones()
        fix = (
            suggest(name, known, "zones, e.g.", most=3)
            if known
            else "this host has no time zone data: install the package tzdata, or use UTC"
        )
        raise ValueError(f"zone {name!r} is unknown; {fix}") from error


class ScheduleEntry(TermsConfig):
    """Terms that hold from `at` to `until`, or `daily` from one clock time to another."""

    at: Moment | None = None
    until: Moment | None = None
    daily: str | None = None
    """`22:00-06:00`; `24:00` is the end of the day."""
    zone: str | None = None
    """Whose clock a daily entry goes by, like `Europe/Berlin`. None: UTC."""

    @model_validator(mode="before")
    @classmethod
    def _without_weekdays(cls, given: object) -> object:
        if isinstance(given, Mapping) and "weekdays" in given:
            raise ValueError(
                "weekdays are no longer known: a daily entry holds on every day; remove the key, "
                "and give the days that differ entries with at and until"
            )
        return given

    @model_validator(mode="after")
    def _timed(self) -> Self:
        if self.terms() == BudgetTerms():
            raise ValueError(
                "the entry says no limits: give limits, gpu_limits or ramp_watts_per_second"
            )
        if self.daily is None:
            if self.at is None or self.until is None:
                raise ValueError("the entry says no time: give at and until, or daily")
            if self.at >= self.until:
                raise ValueError(f"at ({self.at}) is not before until ({self.until})")
            if self.zone is not None:
                raise ValueError("a zone belongs to daily entries: remove it")
            return self
        if self.at is not None or self.until is not None:
            raise ValueError("daily excludes at and until: make two entries of it")
        self.minutes  # noqa: B018 - raises where it is wrong
        _zone(self.zone or "UTC")
        return self

    @property
    def minutes(self) -> tuple[int, int]:
        """Start and end of a daily entry, in minutes of the day.

        Raises:
            ValueError: `daily` is no such thing.
        """
        start, _, end = (self.daily or "").partition("-")
        first, last = _clock_minute(start), _clock_minute(end)
        if first is None or last is None or first == MINUTES_OF_DAY:
            raise ValueError(f"daily={self.daily!r} is no span of the day; write 22:00-06:00")
        if first == last:
            raise ValueError(f"daily={self.daily!r} has no length; for all day write 00:00-24:00")
        return first, last

    @property
    def name(self) -> str:
        """As logs and messages call it."""
        if self.daily is None:
            return f"at {self.at} until {self.until}"
        return f"daily {self.daily} {self.zone or 'UTC'}"

    def scheduled(self) -> ScheduledTerms:
        """The same as the core's value."""
        if self.at is not None and self.until is not None:
            return ScheduledTerms(self.terms(), self.name, dated_span(self.at, self.until))
        zone = _zone(self.zone or "UTC")
        return ScheduledTerms(self.terms(), self.name, daily_spans(*self.minutes, zone))


def check_schedule(entries: Sequence[ScheduleEntry]) -> None:
    """No two dated entries overlap, and no two daily ones. A dated one lies over a daily one.

    Raises:
        ValueError: naming the two.
    """
    for one, two in combinations(entries, 2):
        if (one.daily is None) != (two.daily is None):
            continue
        if one.daily is not None and (one.zone or "UTC") != (two.zone or "UTC"):
            raise ValueError(
                f"schedule has daily entries of two zones ({one.name}; {two.name}), which may "
                "overlap in one season and not in another: give them one zone"
            )
        if _overlap(one, two):
            raise ValueError(
                f"schedule entries overlap: {one.name}, and {two.name}; only a dated entry may "
                "lie over a daily one: end the first where the second starts"
            )


def _overlap(one: ScheduleEntry, two: ScheduleEntry) -> bool:
    if one.at and one.until and two.at and two.until:
        return one.at < two.until and two.at < one.until
    return days_overlap(one.minutes, two.minutes)
