"""Processes of this host, as the kernel's table has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def process_state(pid: int) -> tuple[str, int]:
    """A process's state, as a letter of proc(5), and its parent's number.

    Raises:
        OSError: there is none.
    """
    # The name, in brackets, may hold brackets and blanks of its own.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1])


def lives(pid: int) -> bool:
    """Whether there is such a process; one that ended and was not reaped is none."""
    try:
        return process_state(pid)[0] not in "ZX"
    except OSError:
        return False


def descendants(ancestor: int) -> list[int]:
    """Living processes below one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, parent = process_state(int(entry))
                if state not in "ZX":
                    children.setdefault(parent, []).append(int(entry))
    return list(_below(ancestor, children))


def _below(ancestor: int, children: dict[int, list[int]]) -> Iterator[int]:
    for child in children.get(ancestor, ()):
        yield child
        yield from _below(child, children)


def pid_namespace() -> int:
    """Which numbers of processes are the same as here; 0 where the kernel does not say."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def lost_parent(pid: int, parent_pid: int, namespace: int) -> bool:
    """Whether a living process was given another parent, because its own has ended.

    Args:
        pid: of the process.
        parent_pid: of who started it; 0: nobody whose end matters.
        namespace: in which both numbers hold; of another one nothing is known.
    """
    if not parent_pid or namespace != pid_namespace():
        return False
    try:
        return process_state(pid)[1] != parent_pid
    except OSError:
        return False
