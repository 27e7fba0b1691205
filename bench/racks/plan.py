"""Which runs make which rows: the comparison, and the proof over several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from bench.harness.aims import Column
from bench.harness.runner import Run, Runner, Search
from bench.racks import policies, searches
from bench.racks.outcome import Outcome
from bench.racks.rows import AIMS, COLUMNS, Entry, Reference
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError
from shaper.simulate.checks import check_setup
from shaper.simulate.setup import RackSetup

LIMIT_RATIOS = (0.90, 0.80, 0.70, 0.60)


@dataclass(frozen=True, slots=True)
class Grid:
    """What the searches may try."""

    tokens: Sequence[int] = searches.STATIC_TOKENS
    sequences: Sequence[int] = searches.STATIC_SEQUENCES
    clock_steps: int = searches.CLOCK_STEPS


QUICK_GRID = Grid((512,), (8, 16), 4)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a part of the comparison found."""

    entries: tuple[Entry, ...] = ()
    tried: tuple[Entry, ...] = ()


@dataclass(slots=True)
class Comparison:
    """All rows. `references` goes by seed, or by what else a row's `seed` stands for."""

    rack: RackSetup
    seeds: tuple[int, ...]
    references: dict[int, Reference]
    entries: list[Entry] = field(default_factory=list)
    tried: list[Entry] = field(default_factory=list)
    columns: tuple[Column, ...] = COLUMNS


def references(rack: RackSetup, name: str = "") -> Search[Reference]:
    """The unshaped racks."""
    small = policies.static(rack, policies.SMALL_BATCHED_TOKENS, rack.max_num_seqs)
    found = yield [Run(f"{policies.UNSHAPED}{name}", rack), Run(f"{policies.SMALL}{name}", small)]
    return Reference(*found)


def limited(rack: RackSetup, before: Outcome, ratio: float) -> Entry:
    """An entry with a limit that is so much of the unshaped peak, to be filled in."""
    watts = policies.group_limit(ratio * before.peak_watts).watts
    return Entry("", None, rack.seed, ratio, watts)


def limit_of(entry: Entry) -> PowerLimit:
    """The group's limit of a row."""
    return policies.group_limit(entry.limit_watts)


def one(entry: Entry, policy: str, build: Callable[[], RackSetup]) -> Search[Rows]:
    """One run, or the reason why there is none."""
    name = f"{entry.limit_ratio:.2f} {policy}"
    try:
        setup = build()
        check_setup(setup)
    except ConfigError as error:
        return Rows((replace(entry, policy=policy, detail=f"not possible: {error}"),))
    (outcome,) = yield [Run(name, setup)]
    return Rows((replace(entry, policy=policy, outcome=outcome),))


def _static(rack: RackSetup, limits: Sequence[Entry], grid: Grid) -> Search[Rows]:
    found = yield from searches.static_grid(rack, grid.tokens, grid.sequences)
    tried = tuple(Entry(policies.STATIC, x.outcome, rack.seed, detail=x.text) for x in found)
    best = [(limit, searches.best_knobs(found, limit.limit_watts)) for limit in limits]
    return Rows(
        tuple(
            replace(limit, policy=policies.STATIC, outcome=knobs.outcome, detail=knobs.text)
            for limit, knobs in best
        ),
        tried,
    )


def _clock(rack: RackSetup, limit: Entry, grid: Grid) -> Search[Rows]:
    found = yield from searches.highest_clock(rack, limit_of(limit), grid.clock_steps)
    clock = found[-1]
    tried = tuple(Entry(policies.CLOCK, x.outcome, rack.seed, detail=x.text) for x in found)
    entry = replace(limit, policy=policies.CLOCK, outcome=clock.outcome, detail=clock.text)
    return Rows((entry,), tried)


def compare(
    runner: Runner, rack: RackSetup, ratios: Sequence[float], grid: Grid | None = None
) -> Comparison:
    """Every policy at every limit under one seed's traffic.

    Args:
        runner: has the traffic.
        rack: unshaped.
        ratios: the limits, of the unshaped peak.
        grid: of the searches; None: that of the full comparison.

    Raises:
        ConfigError: the rack can't be run, or a limit is not above its floor.
    """
    grid = grid or Grid()
    (reference,) = runner.drive([references(rack)])
    limits = [limited(rack, reference.unshaped, ratio) for ratio in ratios]
    for limit in limits:
        check_setup(policies.shared(rack, limit_of(limit)))
    # Those that take longest first: at the end no core should wait for one of them.
    parts = [
        one(limit, policy, build)
        for limit in limits
        for policy, build in reversed(policies.limited(rack, limit_of(limit)))
    ]
    parts += [_clock(rack, limit, grid) for limit in limits]
    parts.append(_static(rack, limits, grid))
    entries = [
        Entry(policies.UNSHAPED, reference.unshaped, rack.seed),
        Entry(policies.SMALL, reference.small, rack.seed),
    ]
    tried: dict[str, Entry] = {}
    for rows in runner.drive(parts):
        entries += rows.entries
        tried |= {each.name: each for each in rows.tried}
    return Comparison(
        rack,
        (rack.seed,),
        {rack.seed: reference},
        _ordered(entries),
        list(tried.values()),
    )


def _ordered(entries: Sequence[Entry]) -> list[Entry]:
    """By limit, the highest first, and by policy; what has no limit before all."""
    return sorted(
        entries,
        key=lambda x: (
            math.inf if math.isnan(x.limit_ratio) else x.limit_ratio,
            -policies.ORDER.index(x.policy),
        ),
        reverse=True,
    )


def prove(runner: Runner, rack: RackSetup, seeds: Sequence[int]) -> Comparison:
    """The unshaped racks and those that the aims are about, under several seeds' traffic.

    Raises:
        ConfigError: as `compare`.
    """

    def seeded(seed: int) -> Search[tuple[Reference, list[Entry]]]:
        base = replace(rack, seed=seed)
        reference = yield from references(base, f", seed {seed}")
        entries = [
            replace(
                limited(base, reference.unshaped, aim.limit_ratio),
                policy=policies.shared_name(aim.itl_target_seconds),
            )
            for aim in AIMS
        ]
        outcomes = yield [
            Run(
                f"{entry.limit_ratio:.2f} {entry.policy}, seed {seed}",
                policies.shared(base, limit_of(entry), aim.itl_target_seconds),
            )
            for entry, aim in zip(entries, AIMS, strict=True)
        ]
        return reference, [
            replace(entry, outcome=outcome)
            for entry, outcome in zip(entries, outcomes, strict=True)
        ]

    found = runner.drive([seeded(seed) for seed in seeds])
    return Comparison(
        rack,
        tuple(seeds),
        {seed: reference for seed, (reference, _) in zip(seeds, found, strict=True)},
        _ordered([entry for _, entries in found for entry in entries]),
    )


def group_sizes(
    rack: RackSetup, limit: PowerLimit, least: int = 8
) -> Search[list[tuple[int, Outcome]]]:
    """Smaller groups of the same engines, for what a decision costs by their number."""
    sizes = []
    engines = rack.engines
    while engines >= least:
        sizes.append(engines)
        engines //= 2
    seconds = min(10.0, rack.duration_seconds)
    # What is timed needs no warm-up, and a long run's would leave nothing of a short one.
    warm_up_seconds = min(rack.warm_up_seconds, seconds / 2)
    racks = [
        replace(rack, engines=n, duration_seconds=seconds, warm_up_seconds=warm_up_seconds)
        for n in sizes
    ]
    outcomes = yield [
        Run(
            f"{each.engines} engines, for the cost of a decision",
            policies.shared(
                each, policies.group_limit(limit.watts * each.engines / rack.engines), 0.1
            ),
        )
        for each in racks
    ]
    return list(zip(sizes, outcomes, strict=True))
