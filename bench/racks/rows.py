"""The arithmetic of a row, the tables, and what the shared ledger is held to.

Ratios of a row: against the unshaped rack under the same traffic and seed; `ITL / 2,048` is
the p99 ITL over that of the unshaped rack with 2,048 batched tokens. A window is over where
its mean is more than 0.5% above the limit, in metered and in true watts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.harness.aims import Case, Column, Section
from bench.racks import policies
from bench.racks.outcome import Outcome

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Reference:
    """The unshaped racks of one seed."""

    unshaped: Outcome
    small: Outcome | None = None
    """With 2,048 batched tokens; None: not run."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: a policy at a limit under one seed's traffic."""

    policy: str
    outcome: Outcome | None
    """None: the rack can't be run so; `detail` says why."""
    seed: int = 0
    limit_ratio: float = NAN
    """Of the unshaped peak; NaN: there is no limit."""
    limit_watts: float = NAN
    detail: str = ""
    """What was found for it, such as the best knobs."""

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.policy} ({self.detail})" if self.detail else self.policy


COLUMNS = (
    Column("limit_ratio", "limit", 2),
    Column("peak_ratio", "peak / limit", 3),
    Column("over_metered_share", "over, metered %", 2, 100.0),
    Column("over_true_share", "over, true %", 2, 100.0),
    Column("throughput_ratio", "tokens/s x", 3),
    Column("ttft_p99_ratio", "p99 TTFT x", 2),
    Column("itl_p99_seconds", "p99 ITL ms", 1, 1e3),
    Column("itl_p99_small_ratio", "ITL / 2,048", 2),
    Column("tokens_per_joule_ratio", "tokens/J x", 3),
    Column("e2el_p50_seconds", "median e2e s", 2),
    Column("kv_peak_ratio", "KV used %", 1, 100.0),
    Column("preemptions", "preempted", 0),
    Column("goodput_requests_per_second", "goodput/s", 2),
)
VARIANT_COLUMNS = (
    Column("own_limit_ratio", "limit / own peak", 3),
    *(column for column in COLUMNS[1:] if column.key != "itl_p99_small_ratio"),
)
TRIED_COLUMNS = (
    Column("peak_watts", "peak W", 0),
    Column("metered_peak_watts", "metered W", 0),
    Column("throughput_ratio", "tokens/s x", 3),
    Column("ttft_p99_ratio", "p99 TTFT x", 2),
    Column("itl_p99_seconds", "p99 ITL ms", 1, 1e3),
    Column("tokens_per_joule_ratio", "tokens/J x", 3),
)


def _over(value: float, base: float) -> float:
    return value / base if base and not math.isnan(base) else NAN


def figures(entry: Entry, reference: Reference) -> dict[str, float]:
    """The figures of a row by the keys of `COLUMNS`; NaN where there is none."""
    found, before = entry.outcome, reference.unshaped
    if found is None:
        return {"limit_ratio": entry.limit_ratio}
    limited = not math.isnan(entry.limit_watts)
    small_itl_seconds = NAN if reference.small is None else reference.small.itl_p99_seconds
    return {
        "limit_ratio": entry.limit_ratio,
        "limit_watts": entry.limit_watts,
        "own_limit_ratio": entry.limit_watts / before.peak_watts,
        "peak_watts": found.peak_watts,
        "metered_peak_watts": found.metered_peak_watts,
        "peak_ratio": found.peak_watts / entry.limit_watts,
        "metered_peak_ratio": found.metered_peak_watts / entry.limit_watts,
        "over_metered_share": found.over_share(entry.limit_watts, metered=True) if limited else NAN,
        "over_true_share": found.over_share(entry.limit_watts, metered=False) if limited else NAN,
        "throughput_ratio": _over(found.output_tokens_per_second, before.output_tokens_per_second),
        "ttft_p99_seconds": found.ttft_p99_seconds,
        "ttft_p99_ratio": _over(found.ttft_p99_seconds, before.ttft_p99_seconds),
        "itl_p99_seconds": found.itl_p99_seconds,
        "itl_p99_small_ratio": _over(found.itl_p99_seconds, small_itl_seconds),
        "tokens_per_joule_ratio": _over(found.tokens_per_joule, before.tokens_per_joule),
        "e2el_p50_seconds": found.e2el_p50_seconds,
        "kv_peak_ratio": found.kv_peak_ratio,
        "preemptions": float(found.preemptions),
        "goodput_requests_per_second": found.goodput_requests_per_second,
    }


NOTE = (
    "x: against the unshaped rack, same traffic. Limit: of the unshaped rack's highest mean of "
    "100 ms. Over: share of windows of 100 ms more than 0.5% above the limit, of the whole run; "
    "latency, throughput and cost leave out the warm-up. Goodput: requests a second with a TTFT "
    "of 1 s at most and a mean ITL of 100 ms at most. A prompt that still waits at the end "
    "counts with what it has waited."
)


def table(
    title: str,
    entries: Sequence[Entry],
    references: Mapping[int, Reference],
    columns: tuple[Column, ...] = COLUMNS,
) -> Section:
    """A line for each row."""
    cases = tuple(Case(each.name, figures(each, references[each.seed])) for each in entries)
    return Section(title, columns, cases, "" if columns is TRIED_COLUMNS else NOTE)


# With fewer engines there are fewer to take turns with, and a p99 of less time is of few requests.
AIMED_ENGINES, AIMED_SECONDS = 8, 30.0


@dataclass(frozen=True, slots=True)
class Aim:
    """What the shared ledger is held to at one limit."""

    limit_ratio: float
    itl_target_seconds: float | None
    columns: tuple[Column, ...]


_KEPT = (
    Column("over_metered_share", "windows over, metered %", 3, 100.0, aim=0.0),
    Column("throughput_ratio", "tokens/s x", 3, aim=0.99, higher=True),
)
AIMS = (
    Aim(
        0.70,
        0.1,
        (
            *_KEPT,
            Column("ttft_p99_ratio", "p99 TTFT x", 2, aim=1.25),
            Column("itl_p99_seconds", "p99 ITL ms", 1, 1e3, aim=0.1),
            Column("tokens_per_joule_ratio", "tokens/J x", 3, aim=1.12, higher=True),
        ),
    ),
    Aim(
        0.70,
        0.05,
        (
            *_KEPT,
            Column("ttft_p99_ratio", "p99 TTFT x", 2, aim=1.8),
            Column("itl_p99_seconds", "p99 ITL ms", 1, 1e3, aim=0.05),
        ),
    ),
    Aim(
        0.85,
        None,
        (
            *_KEPT,
            Column("ttft_p99_ratio", "p99 TTFT x", 2, aim=1.2),
            Column("itl_p99_small_ratio", "p99 ITL / 2,048", 3, aim=1.05),
        ),
    ),
)


def aimed(entries: Sequence[Entry], references: Mapping[int, Reference]) -> list[Section]:
    """A section for each aim that there are rows for, one case for each seed.

    Rows of fewer than `AIMED_ENGINES` engines, or of less than `AIMED_SECONDS`, are not judged.
    """
    found = []
    for aim in AIMS:
        name = policies.shared_name(aim.itl_target_seconds)
        cases = tuple(
            Case(f"seed {each.seed}", figures(each, references[each.seed]))
            for each in entries
            if each.policy == name
            and math.isclose(each.limit_ratio, aim.limit_ratio)
            and each.outcome is not None
            and each.outcome.engines >= AIMED_ENGINES
            and each.outcome.duration_seconds >= AIMED_SECONDS
        )
        if cases:
            found.append(Section(f"{aim.limit_ratio:.2f}, {name}", aim.columns, cases, ""))
    return found
