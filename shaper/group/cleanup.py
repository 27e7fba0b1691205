"""Removes the files of groups without engines: killed engines leave theirs.

An engine that is killed can't leave, and vLLM kills its engines where they don't end at
once. The file stays for the engine that joins next, with what the killed ones had launched. A
minute later that has left every window, and the file is unused memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path

from shaper.errors import FleetError
from shaper.group.lock import ALIVE
from shaper.group.presence import presence_path
from shaper.group.reservations import MAX_WINDOW_SECONDS
from shaper.group.shared_file import GroupFile, group_directory

logger = logging.getLogger(__name__)


def cleanup_groups(
    now_seconds: float, ended: str | None = None, *, directory: Path | None = None
) -> None:
    """Remove this user's files of dead groups. Never waits, and leaves what is uncertain.

    Args:
        now_seconds: of the monotonic clock.
        ended: a group whose last servers have ended in order; it is removed at once.
        directory: where groups lie, by default in `/dev/shm`.
    """
    folder = group_directory() if directory is None else directory
    for path in folder.glob("*.group"):
        # One that just went, that somebody joins now, or that is no group's file at all.
        with contextlib.suppress(FileNotFoundError, FleetError):
            file = GroupFile(path.stem, directory)
            with file.members(wait_seconds=0.0) as locks:
                if locks.held(ALIVE, 0):
                    continue
                limits = file.limits(locks)
                if path.stem == ended or limits is None:
                    heard_seconds = -math.inf
                else:
                    marks = file.map(limits).marks
                    heard_seconds = float(marks["heartbeat_seconds"].max())
                if heard_seconds < now_seconds - MAX_WINDOW_SECONDS:
                    file.remove()
                    presence_path(file.name, folder.parent).unlink(missing_ok=True)
                    logger.info("removed power group %s: nobody lives in it", file.name)
