"""Whether a power group takes another engine: asked before vLLM is loaded, and at the join."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

from shaper.core.types import PowerLimit
from shaper.errors import FleetError
from shaper.group.lock import ALIVE, ByteLocks
from shaper.group.presence import refuse_others
from shaper.group.reservations import MAX_WINDOW_SECONDS
from shaper.group.shared_file import CAPACITY, GroupFile, SharedFile, named
from shaper.group.status import state_of, trouble

# It becomes the name of a file.
_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
# An orphan ends itself: it looks twice a second, and has 5 s for what it writes.
_ORPHAN_SECONDS = 6.0
_POLL_SECONDS = 0.25


def check_terms(name: str, limits: Sequence[PowerLimit]) -> None:
    """Refuse what is no name or no limit of a group.

    Raises:
        FleetError: naming it.
    """
    if not _NAME.fullmatch(name):
        raise FleetError(f"power group {name!r} is not 1 to 64 letters, digits and dashes")
    if not limits:
        raise FleetError(f"power group {name} has no limit: give one, like 4000W@100ms")
    for limit in limits:
        if not (0.0 < limit.watts < math.inf and 0.0 < limit.window_seconds <= MAX_WINDOW_SECONDS):
            raise FleetError(
                f"power group {name}: {named([limit])} is no limit; give watts above 0, and a "
                f"window of at most {MAX_WINDOW_SECONDS:g} s"
            )


def free_rows(
    file: GroupFile,
    shared_file: SharedFile,
    locks: ByteLocks,
    limits: Sequence[PowerLimit],
    idle_watts: float,
    engines: int,
) -> list[int]:
    """Rows for so many engines with this idle power each. Inside `GroupFile.members`.

    Raises:
        FleetError: there is no room for them; engines that hang or serve nobody are named.
    """
    members = shared_file.members()
    alive = [row for row in members if locks.held(ALIVE + row)]
    found = (trouble(shared_file, row, time.monotonic()) for row in alive)
    why = "".join(f"; {each}" for each in found if each is not None)
    floor_watts = idle_watts * engines + float(shared_file.rows.table["idle_watts"][alive].sum())
    for limit in limits:
        if limit.watts <= floor_watts:
            raise file.error(
                f"its limit of {named([limit])} is not above what its {len(alive)} engine(s) and "
                f"{'this one' if engines == 1 else f'{engines} more'} draw idle "
                f"({floor_watts:.0f} W): no schedule can keep it; give all of "
                f"them more than {math.ceil(floor_watts)} W, or start fewer{why}"
            )
    free = sorted(set(range(CAPACITY)) - set(members))
    if len(free) < engines:
        raise file.error(
            f"it has {len(members)} engines already, and can hold {CAPACITY}: start another{why}"
        )
    return free[:engines]


def check_group(
    name: str,
    limits: Sequence[PowerLimit],
    *,
    idle_watts: float | None = None,
    engines: int = 1,
    directory: Path | None = None,
) -> None:
    """Whether a group could be joined with these limits, without joining.

    An engine in it whose server was killed is given the time that it needs to end itself.

    Args:
        name: of the group.
        limits: of it.
        idle_watts: as in `join_group`, of each engine; None: it is not known yet.
        engines: that would join.
        directory: where groups lie.

    Raises:
        FleetError: as from `join_group`.
    """
    check_terms(name, limits)
    file = GroupFile(name, directory)
    refuse_others(name, file.path.parent.parent)
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            with file.members() as locks:
                in_use, _ = file.check(locks, limits)
                if not in_use or idle_watts is None:
                    return
                shared_file = file.map(limits)
                free_rows(file, shared_file, locks, limits, idle_watts, engines)
                return
        except FileNotFoundError:
            return
        except FleetError:
            if not _orphans(file, limits) or time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _orphans(file: GroupFile, limits: Sequence[PowerLimit]) -> bool:
    with contextlib.suppress(FileNotFoundError, FleetError), file.members() as locks:
        in_use, _ = file.check(locks, limits)
        if in_use:
            shared_file, now = file.map(limits), time.monotonic()
            return any(
                locks.held(ALIVE + row) and state_of(shared_file, row, now) == "orphaned"
                for row in shared_file.members()
            )
    return False
