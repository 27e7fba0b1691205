"""Power groups of this user on this host: who lives in them, and how they stand."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from shaper.doctor.findings import Checks, Finding, plain
from shaper.errors import FleetError
from shaper.group.lock import ALIVE
from shaper.group.presence import apart
from shaper.group.shared_file import GroupFile, group_directory, named
from shaper.group.status import GroupSnapshot, snapshot
from shaper.ipc.group_status import MEMBER_STATES, MemberState

_SECTION = "Power groups"
# The worst first.
_ADVICE: dict[MemberState, str] = {
    "orphaned": "the server of an orphaned engine is gone, and it serves nobody: kill -9 it",
    "stalled": "a stalled engine is stopped or hangs: kill -CONT it, or see its log",
    "gone": "an engine that is gone was killed: see its log",
}
# Joining takes milliseconds; who takes longer is said to be in the way.
_WAIT_SECONDS = 0.5


def group_findings(directory: Path | None = None) -> list[Finding]:
    """One finding for each group, or one that says there is none."""
    folder = group_directory() if directory is None else directory
    paths = sorted(folder.glob("*.group")) if folder.is_dir() else []
    found = [_group(path.stem, directory) for path in paths]
    alone = apart() if found else None
    if alone is not None:
        what, _, advice = alone.rpartition("; ")
        found.append(Checks(_SECTION).warn("group.shared", what, advice))
    return found or [Checks(_SECTION).ok("group.groups", "none on this host as this user")]


def _group(name: str, directory: Path | None) -> Finding:
    checks = Checks(_SECTION)
    label = plain(name, 64)
    try:
        file = GroupFile(name, directory)
        with file.members(wait_seconds=_WAIT_SECONDS) as locks:
            limits = file.limits(locks)
            alive = locks.held(ALIVE, 0)
            segment = file.map(limits) if limits is not None else None
    except FileNotFoundError:
        return checks.ok("group.standing", f"{label}: just ended", name=name)
    except FleetError as error:
        advice = "see docs/group.md; no engine joins it as it is"
        return checks.fail("group.standing", str(error), advice, name=name)
    if limits is None or segment is None or not alive:
        return checks.warn(
            "group.standing",
            f"{label}: nobody lives in it",
            "its engines were killed or have ended; the next server's end removes the file",
            name=name,
            alive=0,
        )
    now = time.monotonic()
    members = segment.members()
    if not members:
        return checks.ok("group.standing", f"{label}: nobody has joined yet", name=name, alive=0)
    state = snapshot(segment, members[0], limits, False, now)
    return _standing(checks, label, state, named(limits))


def _standing(checks: Checks, name: str, state: GroupSnapshot, limits: str) -> Finding:
    count = {kind: sum(engine.state == kind for engine in state.engines) for kind in MEMBER_STATES}
    used = ", ".join(
        f"{watts:.0f} of {limit}"
        for watts, limit in zip(state.used_watts, state.limits, strict=True)
    )
    said = f"{name}: {_counted(count.items())}; committed {used}"
    data: dict[str, object] = {"name": name, "limits": limits}
    data.update((str(kind), number) for kind, number in count.items())
    if count["alive"] < len(state.engines):
        who = [
            f"{plain(e.label, 40)} (process {e.pid})" for e in state.engines if e.state != "alive"
        ]
        return checks.warn(
            "group.standing",
            said,
            f"{', '.join(who)}: {_ADVICE[next(k for k in _ADVICE if count[k])]}",
            **data,
        )
    over = [w > limit.watts for w, limit in zip(state.used_watts, state.limits, strict=True)]
    if any(over):
        advice = "its limits are below what its engines need: raise them, or send less work"
        return checks.warn("group.standing", said, advice, **data)
    return checks.ok("group.standing", said, **data)


def _counted(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in items if number) or "no engine"
