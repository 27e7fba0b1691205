"""A power group as an operator writes it: its name, its limits, and where they are metered.

Engines of one host that name the same group share its limits. They hold for what the GPUs
of all of them draw together, or for what the server draws at the wall. Of that the GPUs get

    GPU watts = wall watts * PSU efficiency - host overhead

where the overhead is what everything else behind the power supplies draws at the most:
CPUs, memory, fans, network and disks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shaper.config.budget import check_limits
from shaper.core.budget import never_binds
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError

# It becomes part of a file's name.
_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
# No power supply loses a third of what it takes: an efficiency below this is a mistake.
MIN_EFFICIENCY_RATIO = 0.7
# What else a server holds draws less than this; more is milliwatts.
MAX_OVERHEAD_WATTS = 50_000.0
# The sampler's thread keeps the heartbeat by which an engine's group knows that it lives.
MAX_SAMPLE_INTERVAL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """What the members of a power group share."""

    name: str
    limits: tuple[PowerLimit, ...]
    """Of the GPUs of all members together; one at least."""


def group_terms(
    name: str | None,
    limits: tuple[PowerLimit, ...],
    host_overhead_watts: float | None,
    psu_efficiency_ratio: float | None,
) -> GroupTerms | None:
    """The group that the settings name; None where they name none.

    Args:
        name: of the group.
        limits: as given; of the GPUs, or of the server if the other two are given.
        host_overhead_watts: what else the server draws, behind its power supplies.
        psu_efficiency_ratio: of its power supplies, 0.7 to 1.

    Raises:
        ValueError: the settings contradict each other; the message says what to do.
    """
    wall = host_overhead_watts is not None or psu_efficiency_ratio is not None
    if name is None:
        if limits:
            raise ValueError(
                "group_limits have no group: name it with power_group (--power-group NAME)"
            )
        if wall:
            raise ValueError(
                "host_overhead_watts and psu_efficiency_ratio turn group limits into watts of "
                "the GPUs, and there is no group: give power_group and group_limits, or leave "
                "them out"
            )
        return None
    if not _NAME.fullmatch(name):
        raise ValueError(f"power_group {name!r} is not 1 to 64 letters, digits and dashes")
    if not limits:
        raise ValueError(
            f"power_group {name!r} has no limit: give group_limits (--group-limit 4000W@100ms)"
        )
    check_limits("group_limits", limits)
    if wall:
        limits = _behind_the_wall(limits, host_overhead_watts, psu_efficiency_ratio)
    return GroupTerms(name, limits)


def _behind_the_wall(
    limits: Sequence[PowerLimit], overhead_watts: float | None, efficiency_ratio: float | None
) -> tuple[PowerLimit, ...]:
    if overhead_watts is None:
        raise ValueError(
            "psu_efficiency_ratio has no overhead: say what CPUs, memory, fans and network draw "
            "with host_overhead_watts (--host-overhead 1800W); 0W if it is taken off already"
        )
    if efficiency_ratio is None:
        raise ValueError(
            "host_overhead_watts has no efficiency: say what the power supplies pass on with "
            "psu_efficiency_ratio (--psu-efficiency 0.94); 1 if the limit is metered behind them"
        )
    if not MIN_EFFICIENCY_RATIO <= efficiency_ratio <= 1.0:
        percent = f"; if this is percent, write {efficiency_ratio / 100:g}"
        raise ValueError(
            f"psu_efficiency_ratio={efficiency_ratio:g} is outside {MIN_EFFICIENCY_RATIO:g} to 1"
            + percent * (70.0 <= efficiency_ratio <= 100.0)
        )
    if not 0.0 <= overhead_watts <= MAX_OVERHEAD_WATTS:
        raise ValueError(
            f"host_overhead_watts={overhead_watts:g} is outside 0 to {MAX_OVERHEAD_WATTS:g} watts"
        )
    found = []
    for limit in limits:
        watts = limit.watts * efficiency_ratio - overhead_watts
        if watts <= 0.0:
            needed_watts = math.ceil(overhead_watts / efficiency_ratio)
            raise ValueError(
                f"group_limits leave the GPUs nothing: {limit.watts:g} W at the wall * "
                f"{efficiency_ratio:g} - {overhead_watts:g} W of overhead = {watts:g} W; give "
                f"more than {needed_watts} W, and what the GPUs shall draw on top"
            )
        found.append(PowerLimit(watts, limit.window_seconds))
    return tuple(found)


def check_membership(name: str, policy: str, sample_interval_seconds: float) -> None:
    """The rest of an engine's settings suits a group.

    Raises:
        ValueError: others would pay for this engine, or take it for dead.
    """
    if policy != "predictive":
        raise ValueError(
            f"policy {policy!r} keeps no shared limit, so others of power_group {name!r} would "
            "pay for it: leave policy or power_group out"
        )
    if sample_interval_seconds > MAX_SAMPLE_INTERVAL_SECONDS:
        raise ValueError(
            f"sample_interval_seconds={sample_interval_seconds:g} is over "
            f"{MAX_SAMPLE_INTERVAL_SECONDS:g}: others of power_group {name!r} would take this "
            "engine for a hung one"
        )


def check_group_idle(terms: GroupTerms, idle_watts: float, engines: int = 1) -> None:
    """Refuse a shared limit that even this server alone, idle, would break.

    What all members draw idle only the group's ledger knows; it is asked when one joins.

    Args:
        terms: the group.
        idle_watts: what the GPUs of one engine draw together between steps.
        engines: of this server that join.

    Raises:
        ConfigError: naming the limit and the idle power.
    """
    for limit in terms.limits:
        if limit.watts <= idle_watts * engines:
            raise ConfigError(
                f"power group {terms.name}: its limit leaves all GPUs {limit}, and those of this "
                f"server's {engines} engine(s) alone draw {idle_watts * engines:.0f} W idle: no "
                "schedule can keep it; give more"
            )


def check_group_binds(terms: GroupTerms, limits: Sequence[PowerLimit]) -> None:
    """Refuse a limit of one engine that can never bind because the group's is tighter.

    Raises:
        ConfigError: naming the two.
    """
    for limit in limits:
        for shared in terms.limits:
            if never_binds(limit, shared):
                raise ConfigError(
                    f"the engine's limit of {limit} can never bind: power group {terms.name} has "
                    f"{shared} for all its engines; lower the first or remove it"
                )
