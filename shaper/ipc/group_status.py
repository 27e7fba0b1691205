"""What an engine says of its power group, as numbers for its status block.

Its members and what they have committed stand in the ledger that they share; each of them
shows the whole, so that the group is seen as long as one of them is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shaper.core.types import PowerLimit

MemberState = Literal["alive", "stalled", "gone", "orphaned"]
MEMBER_STATES: tuple[MemberState, ...] = ("alive", "stalled", "gone", "orphaned")

# From `GroupStatus`, in this order; gauges unless `_total`.
GROUP_METRICS = (
    ("shaper_group_committed_watts", "Power of all engines, as committed for the last 100 ms."),
    ("shaper_group_floor_watts", "What this engine draws in its group whatever comes next."),
    ("shaper_group_oldest_wait_seconds", "How long the group's first held back prompt has waited."),
    ("shaper_group_claims_refused_total", "Steps that fitted no longer when they were claimed."),
    ("shaper_group_fallback_steps_total", "Steps on the static share: the lock was not to be had."),
    ("shaper_group_lock_wait_seconds_total", "Time that this engine waited for the group's lock."),
    ("shaper_group_detached", "1: the group's file was removed; who joins now is not seen."),
    ("shaper_group_errors_total", "Failures to keep the group's heartbeat, or to read its state."),
)
# As many members as the block has room for, beside 32 limits.
_MOST_MEMBERS = 32
_MEMBER_FIELDS = 5


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One engine of the group."""

    pid: int
    state: MemberState
    floor_watts: float
    committed_watts: float
    """Mean of the last 100 ms."""
    waiting_seconds: float | None = None
    """Of its first held back prompt; None where none is."""


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """The group as one engine sees it."""

    limits: tuple[PowerLimit, ...]
    members: tuple[MemberStatus, ...]
    committed_watts: float = math.nan
    floor_watts: float = math.nan
    claims_refused: int = 0
    static_steps: int = 0
    lock_wait_seconds: float = 0.0
    detached: bool = False
    errors: int = 0

    def count(self, state: MemberState) -> int:
        """Members in this state."""
        return sum(member.state == state for member in self.members)

    def values(self) -> list[float]:
        """As numbers for the status block: `GROUP_METRICS`, limits, members."""
        waits = [m.waiting_seconds for m in self.members if m.waiting_seconds is not None]
        numbers: list[float] = [
            *(self.committed_watts, self.floor_watts, max(waits, default=0.0)),
            *(self.claims_refused, self.static_steps, self.lock_wait_seconds),
            *(float(self.detached), self.errors, len(self.limits)),
        ]
        for limit in self.limits:
            numbers += (limit.watts, limit.window_seconds)
        for member in self.members[:_MOST_MEMBERS]:
            wait = math.nan if member.waiting_seconds is None else member.waiting_seconds
            state = float(MEMBER_STATES.index(member.state))
            numbers += (member.pid, state, member.floor_watts, member.committed_watts, wait)
        return numbers

    @classmethod
    def from_values(cls, values: Sequence[float]) -> GroupStatus | None:
        """From a status block; None where the engine is in no group."""
        first = len(GROUP_METRICS) + 1
        if len(values) < first:
            return None
        committed, floor, _, refused, static, waited, detached, errors, count = values[:first]
        last = first + 2 * int(count)
        pairs = values[first:last]
        members = []
        for begin in range(last, len(values) - _MEMBER_FIELDS + 1, _MEMBER_FIELDS):
            pid, state, watts, drawn, wait = values[begin : begin + _MEMBER_FIELDS]
            members.append(
                MemberStatus(
                    *(int(pid), MEMBER_STATES[int(state)], watts, drawn),
                    None if math.isnan(wait) else wait,
                )
            )
        return cls(
            tuple(map(PowerLimit, pairs[::2], pairs[1::2])),
            tuple(members),
            committed,
            floor,
            int(refused),
            int(static),
            waited,
            bool(detached),
            int(errors),
        )
