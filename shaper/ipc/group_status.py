"""What an engine says of its power group in its status block.

Its members and what they have committed stand in the ledger that they share; each of them
shows the whole, so that the group is seen as long as one of them is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shaper.core.types import PowerLimit

MemberState = Literal["alive", "stalled", "gone", "orphaned"]
MEMBER_STATES: tuple[MemberState, ...] = ("alive", "stalled", "gone", "orphaned")

# As many members as the block has room for, beside 32 limits.
MOST_MEMBERS = 32


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

    @property
    def oldest_wait_seconds(self) -> float:
        """Of the first held back prompt of all members; 0: none is held back."""
        return max((member.waiting_seconds or 0.0 for member in self.members), default=0.0)
