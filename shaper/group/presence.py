"""One name, one group: engines of two users can't share a budget, and must not believe that
they do.

A user's groups lie where no other user may read, so another user's group of the same name would
be a second one, each with the whole limit. So every engine of a group holds a lock on a small
file beside that directory, which all may read: an engine that opens a name finds the engines of
others by their locks. Its own file is held before the others' are looked at, so that of two
who begin at once at least one sees the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import struct
from pathlib import Path

from shaper.errors import FleetError

_PREFIX = "vllm-shaper-group"
# The namespace that the kernel starts with.
_HOST_IPC = "ipc:[4026531839]"
# struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def presence_path(name: str, base: Path, uid: int | None = None) -> Path:
    """The file by which a user's engines of a group are seen by others."""
    return base / f"{_PREFIX}-{os.getuid() if uid is None else uid}-{name}"


class Presence:
    """That an engine of this user is in a group. Ended with the process, or by `close`.

    Args:
        name: of the group.
        base: where the directories of all users' groups lie.
        uid: of this user.

    Raises:
        FleetError: an engine of another user is in a group of this name, or the file can't
            be had.
    """

    def __init__(self, name: str, base: Path, uid: int | None = None) -> None:
        uid = os.getuid() if uid is None else uid
        self.path = presence_path(name, base, uid)
        self._descriptor: int | None = None
        try:
            self._descriptor = _open_own(self.path)
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK))
        except OSError as error:
            self.close()
            raise FleetError(
                f"power group {name}: {self.path}, by which other users see it, can't be had "
                f"({error.strerror}): if no server uses it, remove it"
            ) from error
        try:
            refuse_others(name, base, uid)
        except FleetError:
            self.close()
            raise

    def remove(self) -> None:
        """Remove the file after this user's last engine left. Call it where none can join."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Be in the group no longer. Twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def refuse_others(name: str, base: Path, uid: int | None = None) -> None:
    """See that no engine of another user is in a group of this name.

    Raises:
        FleetError: one is; the message says whose, and what to do.
    """
    uid = os.getuid() if uid is None else uid
    pattern = re.compile(rf"{_PREFIX}-(\d+)-{re.escape(name)}")
    for path in base.glob(f"{_PREFIX}-*-{name}"):
        match = pattern.fullmatch(path.name)
        if match is not None and int(match[1]) != uid and _held(path):
            raise FleetError(
                f"power group {name}: engines of {_named(int(match[1]))} are in a group of this "
                f"name on this host, and engines of {_named(uid)} can't share their limit: run all "
                "servers of the group as one user, or give this one another group and a limit "
                "of its own"
            )


def apart(proc: Path = Path("/proc")) -> str | None:
    """Why engines of this host may share a group's name with this process and not its limit.

    Two containers with a `/dev/shm` each, or a service with one of its own, see nothing of
    each other by which it could be noticed: it can only be said.

    Returns:
        What is so, and what to do; None where this process sees the host's memory.
    """
    remedy = "engines elsewhere on this host begin a group of their own, with the whole limit"
    with contextlib.suppress(OSError):
        if os.readlink(proc / "self/ns/ipc") != _HOST_IPC:
            return (
                f"this process is in a container whose /dev/shm may be its own: {remedy}; "
                "run all of the group's containers with --ipc=host (or one shared /dev/shm)"
            )
    with contextlib.suppress(OSError, IndexError):
        if _memory(proc / "self/mountinfo") != _memory(proc / "1/mountinfo"):
            return (
                f"/dev/shm is not the host's here: {remedy}; leave out what mounts over it "
                "(TemporaryFileSystem=, InaccessiblePaths= of a service)"
            )
    return None


def _memory(mounts: Path) -> tuple[str, str] | None:
    """Device and root of what is mounted at `/dev/shm`, the last of them; see proc(5)."""
    found = None
    for line in mounts.read_text().splitlines():
        fields = line.split()
        if fields[4] == "/dev/shm":
            found = fields[2], fields[3]
    return found


def _lock(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 1, 0)


def _open_own(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    # A file that is there already is opened without O_CREAT, which kernels refuse for files
    # of others in a directory like this.
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_CREAT, 0o644)
    os.fchmod(descriptor, 0o644)  # whatever the umask says
    return descriptor


def _held(path: Path) -> bool:
    """Whether any process holds it. One that can't be asked, or is no plain file, is held by
    nobody: it names no engine."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        asked = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK))
        return bool(_FLOCK.unpack(asked)[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _named(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"
