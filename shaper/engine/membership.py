"""One engine's membership of a power group: keeps its heartbeat, says how the group stands.

While a controller schedules by the ledger, the ledger knows what the engine draws. While
none does, the engine counts there for what it may draw at the most:

    a controller decides, applied or in shadow    what it has entered
    it has failed, and the fallback cap holds         the engine's static share
    it has failed in shadow, or the mode is off   the GPUs' enforced limits

so that the others keep the limit beside an engine that nobody holds back. Only where the
enforced limits of such engines leave the others less than they draw idle can the sum go over.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable

from shaper.config.budget import loose_limits
from shaper.config.group import GroupTerms
from shaper.core.budget import BudgetTerms
from shaper.core.model.power_model import StepModel
from shaper.core.supervise.status import Usage, usage
from shaper.core.types import PowerBudget
from shaper.engine.protocols import Mode
from shaper.engine.readers import EngineGpus
from shaper.group import GroupSnapshot, HostGroup, apart, cleanup_groups, join_group
from shaper.ipc.group_status import MOST_MEMBERS, GroupStatus, MemberStatus

logger = logging.getLogger(__name__)

# A look at all members takes the interpreter, which schedules meanwhile, some milliseconds.
LOOK_SECONDS = 0.5


class Membership:
    """Keeps one engine in its group. All but `capped` on the sampler's thread.

    Args:
        handle: of the group, joined.
        free_watts: what the engine's GPUs draw at the most with nobody holding them back.
        clock: monotonic seconds; the time of the sampler's tick is from before the GPUs
            were read, which may take long.
    """

    def __init__(
        self, handle: HostGroup, free_watts: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.handle = handle
        self._free_watts = free_watts
        self._clock = clock
        self._errors = 0
        self._looked_seconds = -math.inf
        self._static_limits = handle.static_limits
        self._status = GroupStatus(handle.limits, ())
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """Of the group's limits, by all its engines, as committed when last looked at."""
        return self._usage

    def capped(self, budget: PowerBudget) -> PowerBudget:
        """The budget and the engine's static share: what the fallback cap has to keep."""
        return dataclasses.replace(budget, limits=budget.limits + self._static_limits)

    def tick(self, mode: Mode, *, decides: bool) -> bool:
        """Be heard, and look at the others.

        Args:
            mode: that was asked for last.
            decides: whether there is a controller.

        Returns:
            Whether the static share is another one now: engines have joined or gone.
        """
        now, before = self._clock(), self._static_limits
        self._guarded(self._beat, now, mode, decides)
        self._guarded(self._look, now)
        return self._static_limits != before

    def _guarded(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception:
            # A group that can't be read must take neither the engine nor its metrics with it.
            if not self._errors:
                logger.exception("the power group's tick failed (said once; later are counted)")
            self._errors += 1

    def _beat(self, now: float, mode: Mode, decides: bool) -> None:
        self.handle.tick(now)
        self._static_limits = self.handle.static_limits
        free = mode == "off" or (mode == "shadow" and not decides)
        if free or not decides:
            # Each time: the scheduler's thread may have spoken last.
            share_watts = max(limit.watts for limit in self._static_limits)
            self.handle.reserve_fixed(self._free_watts if free else share_watts, now)

    def _look(self, now: float) -> None:
        """What the group looks like, for those who ask."""
        if now - self._looked_seconds >= LOOK_SECONDS:
            self._looked_seconds = now
            found = self.handle.snapshot(now)
            self._status, self._usage = _status(found), _usage(found)

    @property
    def status(self) -> GroupStatus:
        """The group as last looked at."""
        return dataclasses.replace(self._status, errors=self._errors)

    def leave(self) -> None:
        """Give the share back. May be called twice."""
        self.handle.leave()


def join(
    terms: GroupTerms | None, gpus: EngineGpus, model: StepModel, label: str
) -> Membership | None:
    """Join the configured group; None where there is none.

    Args:
        terms: of the group.
        gpus: of the engine.
        model: its step model.
        label: tells the engine from the others, for people.

    Raises:
        FleetError: the group has other limits, or the engine can't join.
    """
    if terms is None:
        return None
    handle = join_group(
        terms.name,
        terms.limits,
        idle_watts=model.gap_watts,
        rest_watts=model.idle_watts,
        rest_after_seconds=gpus.profile.power.gap_hold_seconds,
        label=label,
        gpu_count=model.gpu_count,
    )
    cleanup_groups(time.monotonic())
    alone = apart()
    if alone is not None:
        logger.warning("power group %s: %s", terms.name, alone)
    free_watts = gpus.enforced_watts(model.gpu_count)
    engines = handle.snapshot(time.monotonic()).engines
    logger.info("joined power group %s as %s (%d engines now)", terms.name, label, len(engines))
    # Of the others only the number of GPUs is known: they count as this engine's.
    gpu_count = sum(engine.gpu_count for engine in engines)
    for warning in loose_limits(
        BudgetTerms(terms.limits),
        gpu_count,
        free_watts / model.gpu_count * gpu_count,
        f"power group {terms.name}, with the {len(engines)} engine(s) that have joined so far",
    ):
        logger.warning("%s", warning)
    return Membership(handle, free_watts)


def _usage(found: GroupSnapshot) -> Usage:
    idle_watts = sum(each.idle_watts for each in found.engines)
    both = zip(found.limits, found.used_watts, strict=True)
    each = (usage(limit.watts, watts, idle_watts) for limit, watts in both)
    return functools.reduce(Usage.together, each, Usage())


def _status(found: GroupSnapshot) -> GroupStatus:
    own = found.engines[found.own]
    return GroupStatus(
        limits=found.limits,
        members=tuple(
            MemberStatus(each.pid, each.state, each.floor_watts, each.watts, each.waiting_seconds)
            for each in found.engines[:MOST_MEMBERS]
        ),
        committed_watts=sum(each.watts for each in found.engines),
        floor_watts=own.floor_watts,
        claims_refused=own.refused,
        static_steps=own.static_steps,
        lock_wait_seconds=own.lock_wait_seconds,
        detached=found.detached,
    )
