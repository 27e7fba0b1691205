"""How a group stands, for people and metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shaper.core.types import PowerLimit
from shaper.group.shared_file import SharedFile, label_of
from shaper.group.usage import mean_watts
from shaper.ipc.processes import lost_parent, pid_namespace

State = Literal["alive", "stalled", "gone", "orphaned"]
# Sampler threads beat every 20 ms, and a driver may hold one for some 100 ms.
STALLED_SECONDS = 1.0
_RECENT_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One engine of a group. Counters are since it joined, as of its last tick."""

    label: str
    pid: int
    """In its own container."""
    state: State
    """`stalled`: it says nothing; `gone`: it died or left, and its row is not free yet;
    `orphaned`: its server is gone, so that it gets no requests and must end."""
    gpu_count: int
    idle_watts: float
    floor_watts: float
    """What others expect it to draw after what it has entered."""
    watts: float
    """Mean of the last 100 ms, as entered."""
    waiting_seconds: float | None
    """For how long its prompts have been held back; None where none is."""
    claims: int
    refused: int
    """Reservations that were taken back."""
    static_steps: int
    """SharedLedger without the lock, checked on the static share as well."""
    lock_wait_seconds: float
    """Sum over its claims."""
    lock_wait_max_seconds: float


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    """A group as one of its engines sees it."""

    limits: tuple[PowerLimit, ...]
    used_watts: tuple[float, ...]
    """For each limit, the mean of all engines over its window until now, as entered."""
    engines: tuple[MemberStatus, ...]
    own: int
    """Which of them asks."""
    epoch_changes: int
    """How often the lock of claims was moved away from a holder that was stopped."""
    detached: bool
    """The group's file was removed or replaced under its engines."""


def snapshot(
    shared_file: SharedFile,
    own: int,
    limits: tuple[PowerLimit, ...],
    detached: bool,
    now_seconds: float,
) -> GroupSnapshot:
    """How a group stands.

    Args:
        shared_file: its file.
        own: the asking engine's row.
        limits: of the group.
        detached: see `GroupSnapshot`.
        now_seconds: now.
    """
    rows = shared_file.rows
    # Its own row may be free already, when it has left.
    members = sorted({own, *shared_file.members()})
    reading = rows.read(np.array(members))
    used = [float(mean_watts(rows, reading, x.window_seconds, now_seconds).sum()) for x in limits]
    recent = mean_watts(rows, reading, _RECENT_SECONDS, now_seconds).tolist()
    return GroupSnapshot(
        limits,
        tuple(used),
        tuple(
            _engine(shared_file, row, watts, now_seconds)
            for row, watts in zip(members, recent, strict=True)
        ),
        members.index(own),
        int(shared_file.gate[0]["epoch"]),
        detached,
    )


def state_of(shared_file: SharedFile, row: int, now_seconds: float) -> State:
    """How the engine of a row fares."""
    mark = shared_file.marks[row]
    if mark["gone_seconds"]:
        return "gone"
    if lost_parent(int(mark["pid"]), int(mark["server_pid"]), int(mark["pid_namespace"])):
        return "orphaned"
    # A sampler that hangs in the driver does not make a stalled engine of one that claims.
    entered = float(shared_file.rows.table[row]["entered_seconds"])
    heard = max(float(mark["heartbeat_seconds"]), entered if math.isfinite(entered) else -math.inf)
    return "stalled" if now_seconds - heard > STALLED_SECONDS else "alive"


def trouble(shared_file: SharedFile, row: int, now_seconds: float) -> str | None:
    """What is wrong with an engine, and what to do; None where nothing is."""
    state, mark = state_of(shared_file, row, now_seconds), shared_file.marks[row]
    if state in ("alive", "gone"):
        return None
    who = f"process {int(mark['pid'])} ({label_of(mark)})"
    if mark["pid_namespace"] != pid_namespace():
        who += ", as its own container counts,"
    if state == "orphaned":
        return f"{who} is an engine whose server is gone: end it (kill -9 {int(mark['pid'])})"
    return (
        f"{who} has said nothing for {now_seconds - float(mark['heartbeat_seconds']):.0f} s: it "
        "is stopped or hangs; let it go on (kill -CONT), or end its server"
    )


def _engine(shared_file: SharedFile, row: int, watts: float, now_seconds: float) -> MemberStatus:
    values, mark = shared_file.rows.table[row], shared_file.marks[row]
    state = state_of(shared_file, row, now_seconds)
    since = float(values["waiting_since_seconds"])
    return MemberStatus(
        label=label_of(mark),
        pid=int(mark["pid"]),
        state=state,
        gpu_count=int(values["gpu_count"]),
        idle_watts=float(values["idle_watts"]),
        floor_watts=shared_file.rows.floor_watts(row, now_seconds),
        watts=watts,
        waiting_seconds=None if math.isnan(since) else max(0.0, now_seconds - since),
        claims=int(mark["claims"]),
        refused=int(mark["refused"]),
        static_steps=int(mark["static_steps"]),
        lock_wait_seconds=float(mark["lock_wait_seconds"]),
        lock_wait_max_seconds=float(mark["lock_wait_max_seconds"]),
    )
