"""Engines of one host that share a power budget: joining, living and leaving.

The others notice that an engine died at their next `tick`: the kernel has freed the byte that
it held. From then on the engine counts with what it had launched and its idle power, and its row
is freed when its last run has left the longest window. A stopped engine keeps its row, with its
idle power; the others use its share meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from shaper.core.ledger.shared import Committed, EngineShare, Step
from shaper.core.types import PowerLimit
from shaper.errors import FleetError
from shaper.group.joining import check_terms, free_rows
from shaper.group.ledger import GroupLedger
from shaper.group.lock import ALIVE, MEMBERSHIP, ByteLocks, ClaimLock
from shaper.group.presence import Presence
from shaper.group.shared_file import GroupFile, SharedFile
from shaper.group.status import GroupSnapshot, snapshot

logger = logging.getLogger(__name__)

# How often the file's name is looked at: it may be removed under a living group.
_NAME_SECONDS = 1.0
_HOSTED: weakref.WeakSet[HostGroup] = weakref.WeakSet()


class HostGroup(GroupLedger):
    """One engine's handle of a group of this host; made by `join_group`.

    `query`, `publish`, `reserve` and `commit` are for the thread that schedules, `tick` for one
    other thread; the rest may be called from any.
    """

    def __init__(
        self,
        file: GroupFile,
        shared_file: SharedFile,
        row: int,
        limits: Sequence[PowerLimit],
        own: ByteLocks,
        others: ByteLocks,
        presence: Presence,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(shared_file.rows, row, limits, ClaimLock(own, shared_file.gate, clock))
        self._file, self._shared_file = file, shared_file
        self._own_locks, self._others_locks = own, others
        self._presence = presence
        self._clock = clock
        self._leaving = threading.Lock()
        self._left = False
        self._name_seconds = -math.inf
        self.detached = False
        """The file was removed or replaced: who joins now will not see this engine."""
        _HOSTED.add(self)

    def publish(self, share: EngineShare, now_seconds: float) -> None:
        """As in `PowerGroup`; after `leave` it does nothing."""
        if not self._left:
            super().publish(share, now_seconds)

    def reserve_fixed(self, floor_watts: float, now_seconds: float) -> None:
        """As in `GroupLedger`; after `leave` it does nothing."""
        if not self._left:
            super().reserve_fixed(floor_watts, now_seconds)

    def reserve(
        self, committed: Committed, share: EngineShare, now_seconds: float, step: Step | None
    ) -> bool:
        """As in `PowerGroup`. False also where this engine was stopped meanwhile, or has left."""
        return not self._left and super().reserve(committed, share, now_seconds, step)

    def commit(self, committed: Committed, share: EngineShare, now_seconds: float) -> None:
        """As in `PowerGroup`; after `leave` it does nothing."""
        if not self._left:
            super().commit(committed, share, now_seconds)

    def tick(self, now_seconds: float) -> None:
        """Write this engine's heartbeat and reap members that ended. Never waits.

        Some 20 ms apart, from a thread of its own.
        """
        with self._leaving:
            if self._left:
                return
            mark = self._shared_file.marks[self._row]
            mark["heartbeat_seconds"] = now_seconds
            mark["claims"], mark["refused"] = self.claims, self.refused
            mark["static_steps"] = self.static_steps
            mark["lock_wait_seconds"] = self.lock_wait_seconds
            mark["lock_wait_max_seconds"] = self.lock_wait_max_seconds
            if self._dead() and self._others_locks.take(MEMBERSHIP):
                try:
                    self._reap(now_seconds)
                finally:
                    self._others_locks.give(MEMBERSHIP)
            if now_seconds - self._name_seconds >= _NAME_SECONDS:
                self._name_seconds = now_seconds
                self._check_name()

    def _dead(self) -> bool:
        return any(not self._others_locks.held(ALIVE + row) for row in self._shared_file.members())

    def _reap(self, now_seconds: float) -> None:
        longest = max(limit.window_seconds for limit in self.limits)
        for label in self._shared_file.reap(self._others_locks, longest, now_seconds):
            logger.warning(
                "power group %s: engine %s is gone; what it had launched stays counted for %g s",
                *(self._file.name, label, longest),
            )

    def _check_name(self) -> None:
        if not self.detached and not self._file.same_file(self._others_locks):
            self.detached = True
            logger.error(
                "power group %s: %s was removed under its engines: they go on sharing, but an "
                "engine that joins now will not see them; restart all of its servers",
                *(self._file.name, self._file.path),
            )

    def snapshot(self, now_seconds: float) -> GroupSnapshot:
        """How the group stands."""
        return snapshot(self._shared_file, self._row, self.limits, self.detached, now_seconds)

    def leave(self) -> None:
        """Leave the group; the last one removes its file. Twice is fine.

        What was launched stays counted until it has left the longest window.
        """
        with self._leaving:
            if self._left:
                return
            self._left = True
            super().publish(EngineShare(0.0), self._clock())
            self._own_locks.free()
        try:
            with self._file.members() as locks:
                ours = self._file.same_file(self._others_locks)
                if ours and not locks.held(ALIVE, 0):
                    self._file.remove()
                    self._presence.remove()
        except FileNotFoundError:
            logger.info("power group %s: its file was gone before", self._file.name)
        except FleetError as error:
            logger.warning("left, but did not look whether others are left: %s", error)
        finally:
            self._presence.close()

    def forked(self) -> None:
        """Make this a handle of nothing, in a child that must not speak for its parent."""
        self._left = True
        self._own_locks.close()
        self._others_locks.close()
        self._presence.close()


def _forked() -> None:
    for group in list(_HOSTED):
        group.forked()


os.register_at_fork(after_in_child=_forked)


def join_group(
    name: str,
    limits: Sequence[PowerLimit],
    *,
    idle_watts: float,
    rest_watts: float,
    rest_after_seconds: float,
    label: str,
    gpu_count: int = 1,
    clock: Callable[[], float] = time.monotonic,
    directory: Path | None = None,
) -> HostGroup:
    """Join a group of this host, or begin it.

    Args:
        name: of the group; letters, digits and dashes.
        limits: of the GPUs of all its engines together; the same for all of them. The handle
            has them in the order of their windows.
        idle_watts: what this engine's GPUs draw between steps, all together.
        rest_watts: what they draw when nothing ran for `rest_after_seconds`.
        rest_after_seconds: see `rest_watts`.
        label: names this engine to people; 64 bytes are kept.
        gpu_count: of this engine; what its static share goes by.
        clock: `CLOCK_MONOTONIC` in seconds, the one clock of all members.
        directory: where groups lie, by default in `/dev/shm`.

    Raises:
        FleetError: the group has other limits, or they are below what its engines and this
            one draw idle; it is full; its file is not to be believed, or can't be had.
    """
    check_terms(name, limits)
    powers = idle_watts, rest_watts
    if not (all(0.0 <= x < math.inf for x in powers) and rest_after_seconds >= 0 < gpu_count):
        raise FleetError(
            f"power group {name}: an engine of {gpu_count} GPUs that draws {idle_watts} W idle and "
            f"{rest_watts} W after {rest_after_seconds} s can't join"
        )
    limits = tuple(sorted(limits, key=lambda limit: limit.window_seconds))
    file = GroupFile(name, directory)
    try:
        with file.members(create=True) as locks, contextlib.ExitStack() as undo:
            presence = Presence(name, file.path.parent.parent)
            undo.callback(presence.close)
            if not file.prepare(locks, limits):
                undo.callback(file.remove)
            shared_file = file.map(limits)
            shared_file.reap(locks, max(x.window_seconds for x in limits), clock())
            [row] = free_rows(file, shared_file, locks, limits, idle_watts, 1)
            own, others = file.open(), file.open()
            if not file.same_file(locks):
                raise FileNotFoundError(file.path)
            own.take(ALIVE + row)
            shared_file.mark(row, label, clock())
            rest = rest_watts, rest_after_seconds
            shared_file.rows.open(row, idle_watts, *rest, clock(), gpu_count)
            undo.pop_all()
    except FileNotFoundError as error:
        raise file.error(f"{file.path} was removed by somebody else: try again") from error
    return HostGroup(file, shared_file, row, limits, own, others, presence, clock)
