"""Keeps one engine on the budget and the mode that hold now.

Runs on the engine's sampler thread. Each tick it looks whether the control file is
another one, and whether time has changed what holds; `shaper/core/budget.py` has the
rules. What it finds is handed on by `tick.py`; the engine itself never waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from shaper.config.budget import check_idle
from shaper.core.budget import BudgetPlan, InForce, describe, resolve
from shaper.errors import ConfigError
from shaper.ipc.control_file import EngineControl, Follower, Mode, RecordOrder
from shaper.ipc.wall_clock import wall_seconds

logger = logging.getLogger(__name__)

# A wall clock that is set is noticed within this time. A start or an end that is known is
# met to the tick.
_LOOK_AGAIN_SECONDS = 1.0


class BudgetControl:
    """The budget and the mode of one engine.

    Args:
        plan: what is configured and scheduled.
        mode: the configured one.
        follower: of the run's control file.
        gpu_count: of the engine.
        idle_watts: what its GPUs draw together between steps.
        now_seconds: of the monotonic clock.
        wall: the wall clock.
        passes_through: why this engine is not to be shaped; it is then off, whatever is asked.
        unshaped_ok: take a budget all the same, which is then not kept.
    """

    def __init__(
        self,
        plan: BudgetPlan,
        mode: Mode,
        follower: Follower,
        *,
        gpu_count: int,
        idle_watts: float,
        now_seconds: float,
        wall: Callable[[], float] = wall_seconds,
        passes_through: str | None = None,
        unshaped_ok: bool = False,
    ) -> None:
        self._plan, self._configured_mode, self._follower = plan, mode, follower
        self._gpu_count, self._idle_watts = gpu_count, idle_watts
        self._wall = wall
        self._passes_through, self._unshaped_ok = passes_through, unshaped_ok
        self._record = follower.record
        # An engine that starts late, or again, finds what was asked for before.
        self._follow()
        self._state = self._evaluate(now_seconds)

    @property
    def state(self) -> EngineControl:
        """What holds now, and what was acknowledged."""
        return self._state

    @property
    def record_order(self) -> RecordOrder | None:
        """The recording that is asked for now. A budget that can't be kept does not forbid it."""
        return self._follower.record.record

    def tick(self, now_seconds: float) -> bool:
        """Look again; whether `state` has another budget or mode now."""
        before = self._state
        if not self._follow() and now_seconds < self._look_seconds:
            return False
        self._state = after = self._evaluate(now_seconds)
        if (after.budget, after.mode) == (before.budget, before.mode):
            return False
        self._log(before, after)
        return True

    def _follow(self) -> bool:
        """Take over a new control file, unless this engine can't do what it says."""
        if not self._follower.poll():
            return False
        record = self._follower.record
        if self._passes_through and record.mode not in (None, "off"):
            self._follower.refuse(f"{record.mode}: {self._passes_through}")
            return True
        if self._passes_through and not self._unshaped_ok and record.budget is not None:
            self._follower.refuse(f"nobody would keep the budget: {self._passes_through}")
            return True
        if record.budget is not None:
            try:
                for terms in (record.budget.terms, record.budget.fallback):
                    if terms is not None:
                        check_idle(terms, self._gpu_count, self._idle_watts, "change")
            except ConfigError as error:
                self._follower.refuse(str(error))
                return True
        self._record = record
        return True

    def _evaluate(self, now_seconds: float) -> EngineControl:
        found: InForce = self._plan.at(self._wall(), now_seconds, self._record.budget)
        self._entries = found.entries
        self._look_seconds = now_seconds + min(_LOOK_AGAIN_SECONDS, found.seconds_left)
        mode = self._record.mode or self._configured_mode
        if self._passes_through:
            mode = "off"
        return EngineControl(
            resolve(found.terms, self._gpu_count),
            mode,
            found.source,
            self._follower.record.sequence,
            self._record.sequence,
            self._follower.refused,
            now_seconds + found.seconds_left,
        )

    def _log(self, before: EngineControl, after: EngineControl) -> None:
        record = self._record
        if after.mode != before.mode:
            why = f" ({record.origins['mode']})" if record.mode else ""
            logger.info("shaper mode: %s -> %s%s", before.mode, after.mode, why)
        if after.budget != before.budget:
            origin = record.origins.get("budget")
            if record.budget is None and after.taken_sequence == before.taken_sequence:
                origin = None
            because = [after.source.value, *self._entries, *([str(origin)] if origin else [])]
            logger.info(
                "shaper budget: %s -> %s (%s)",
                describe(before.budget),
                describe(after.budget),
                ", ".join(because),
            )
