"""What an engine's controller asks of a ledger that it shares with others.

The group's limits hold for the sum of its engines. Each engine tells the others what it
has committed, as joules on the host's monotonic clock, and what it will draw after that
(its floor). It asks before a step (`query`), and claims the step's joules before
it is launched (`reserve`); what really ran, and what is in flight, it enters (`commit`).

The pace of decode steps that the limits leave is the same for all (`group/fairness.py`), so
that the decodes of one engine never pay for the prompts of another.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from shaper.core.ledger.curve import Array
from shaper.core.ledger.headroom import WindowPart
from shaper.core.types import PowerLimit, StepPrediction

HISTORY_SECONDS = 0.05
"""How far back an engine's corners go, so that a bin of the shared grid is entered whole."""


class EngineShare(NamedTuple):
    """What an engine tells the others of its group."""

    floor_watts: float
    """Power after its committed runs: idle, and the decodes that must go on."""
    decode_joules: float = 0.0
    """Above idle power, of a step of all its decodes; 0 where none is ready."""
    decode_seconds: float = 0.0
    """Of the same step."""
    prefill_watts: float = 0.0
    """Mean power above idle that its prompts took of late."""
    burst_joules: float = 0.0
    """What prompts that come together mostly take, above idle power."""
    waiting_since_seconds: float | None = None
    """When the first of the prompts that are held back began to wait; None where none is."""
    waiting_joules: float = 0.0
    """Above idle power, of the step that those prompts want, with its decodes."""
    decodes_due_seconds: float | None = None
    """When its decodes should run at the latest; None where none is ready."""
    margin_ratio: float = 0.0
    """Part of each limit that it asks to keep free: by how much its prediction may be wrong."""


class GroupView(NamedTuple):
    """What the group leaves this engine for a step that starts at one given time."""

    parts: tuple[WindowPart, ...]
    """One for each limit of the group, with all other engines in it."""
    sustained_watts: float = math.inf
    """What this engine may draw for long, less the margin."""
    cadence_seconds: float = 0.0
    """The fair pace of decode steps; 0: as fast as they go, infinity: none is slow enough."""
    others_held_seconds: float = 0.0
    """For how long the prompts of another engine have been held back, at the most."""
    late_joules: float = 0.0
    """What others take before any step of this engine: their decodes that are later."""
    ahead_joules: float = 0.0
    """And before one with prompts: with the prompts that have waited for longer."""
    waiting_joules: float = 0.0
    """And before one of decodes that are not late: with all prompts that wait."""


class Committed(NamedTuple):
    """An engine's energy over time, piecewise linear: spent, and launched but not yet over."""

    final_seconds: float
    """What lies before changes no more. Never earlier than the last one."""
    times: Array
    """[corners] seconds, ascending, from `HISTORY_SECONDS` before `final_seconds` at the latest."""
    joules: Array
    """[corners] since any zero."""


class Step(NamedTuple):
    """A step that is checked again under the ledger's lock."""

    start_seconds: float
    prediction: StepPrediction


class PowerGroup(Protocol):
    """One engine's handle of the shared ledger; used by the thread that schedules."""

    @property
    def limits(self) -> tuple[PowerLimit, ...]:
        """The group's limits; fixed while it lives."""
        ...

    def query(self, start_seconds: float, now_seconds: float, share: EngineShare) -> GroupView:
        """What a step that starts at `start_seconds` may draw.

        Args:
            start_seconds: when it would start: when this engine's runs in flight end, or now.
            now_seconds: now.
            share: what this engine says of itself; its floor goes on after the step.
        """
        ...

    def publish(self, share: EngineShare, now_seconds: float) -> None:
        """Say how this engine stands, where nothing is claimed or entered."""
        ...

    def reserve(
        self, committed: Committed, share: EngineShare, now_seconds: float, step: Step | None
    ) -> bool:
        """Enter runs, the last of which is a step about to be launched.

        Args:
            committed, share, now_seconds: see `commit`.
            step: the last run, to be checked again if others have entered anything since
                `query`; None enters it whatever they did.

        Returns:
            False where it fits no longer; then nothing was entered.
        """
        ...

    def commit(self, committed: Committed, share: EngineShare, now_seconds: float) -> None:
        """Replace what this engine had entered from `committed.final_seconds` on.

        Args:
            committed: its runs.
            share: what it says of itself.
            now_seconds: now.
        """
        ...
