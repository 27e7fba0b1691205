"""The file that the engines of a group map: where it lies, and what of it is believed.

It lies in a directory of this user that no other user may open. A header is followed by the
marks of the members and by their rows. Nothing in it says who lives: each member holds a
lock on a byte of its own (`shaper/group/lock.py`), which the kernel frees with the
process; process numbers mean nothing across containers, and are used again.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import shlex
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shaper.core.types import PowerLimit
from shaper.errors import FleetError
from shaper.group.lock import ALIVE, GATE, MEMBERSHIP, ByteLocks
from shaper.group.reservations import BINS, ROW, Reservations, table_bytes
from shaper.ipc.processes import pid_namespace

_MEMORY = Path("/dev/shm")
CAPACITY = 64
"""Engines of one group: 4 MB of memory for each grid that its limits need."""
LAYOUT = 3
_MAGIC = b"SHAPERGR"
# Magic, layout, capacity, bins, sizes of a row and a mark, number of limits, boot.
_FIXED = struct.Struct("<8sIIIIII36s4x")
_LIMIT = struct.Struct("<dd")
MAX_LIMITS = 64
_GATE_OFFSET = 2048
_HEADER_BYTES = 4096
# Joining takes milliseconds.
_JOIN_SECONDS = 5.0
_POLL_SECONDS = 0.002

MARK = np.dtype(
    [
        ("label", "S64"),
        ("pid", np.int64),
        ("server_pid", np.int64),
        ("pid_namespace", np.int64),
        ("gone_seconds", np.float64),
        ("heartbeat_seconds", np.float64),
        ("claims", np.int64),
        ("refused", np.int64),
        ("static_steps", np.int64),
        ("lock_wait_seconds", np.float64),
        ("lock_wait_max_seconds", np.float64),
    ]
)
"""What a member says of itself beside its row. Written by itself, apart from
`gone_seconds`: when others found it dead, 0 before."""


_SIZES = (LAYOUT, CAPACITY, BINS, ROW.itemsize, MARK.itemsize)


def _ordered(limits: Sequence[PowerLimit]) -> list[tuple[float, float]]:
    return sorted((limit.window_seconds, limit.watts) for limit in limits)


def group_directory() -> Path:
    """Where this user's groups lie: in memory if the machine has it."""
    base = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    return base / f"shaper-{os.getuid()}"


def named(limits: Sequence[PowerLimit]) -> str:
    """Limits for a message."""
    return ", ".join(map(str, limits))


class SharedFile:
    """A group's file, mapped.

    Args:
        memory: of the whole file.
        limits: of the group.
    """

    def __init__(self, memory: mmap.mmap, limits: Sequence[PowerLimit]) -> None:
        self.gate: npt.NDArray[np.void] = np.ndarray((1,), GATE, memory, _GATE_OFFSET)
        self.marks: npt.NDArray[np.void] = np.ndarray((CAPACITY,), MARK, memory, _HEADER_BYTES)
        self.rows = Reservations(memory, CAPACITY, limits, _HEADER_BYTES + self.marks.nbytes)

    def members(self) -> list[int]:
        """Rows that are in use, by the living and by those who died lately."""
        rows: list[int] = np.flatnonzero(self.rows.table["used"]).tolist()
        return rows

    def mark(self, row: int, label: str, now_seconds: float) -> None:
        """Begin the mark of a new member."""
        self.marks[row] = np.zeros((), MARK)
        mark = self.marks[row]
        mark["label"] = label.encode(errors="replace")
        mark["pid"] = os.getpid()
        # An engine that is no child of a server has no server whose end matters.
        mark["server_pid"] = 0 if multiprocessing.parent_process() is None else os.getppid()
        mark["pid_namespace"] = pid_namespace()
        mark["heartbeat_seconds"] = now_seconds

    def reap(self, locks: ByteLocks, longest_seconds: float, now_seconds: float) -> list[str]:
        """See to the dead; inside `GroupFile.members`, or holding its lock.

        Returns:
            Labels of those found dead for the first time.
        """
        found = []
        for row in self.members():
            if locks.held(ALIVE + row):
                continue
            values, mark = self.rows.table[row], self.marks[row]
            if not mark["gone_seconds"]:
                mark["gone_seconds"] = now_seconds
                found.append(label_of(mark))
                # Its decodes go on no more.
                values["entered_seconds"] = min(float(values["entered_seconds"]), now_seconds)
                values["waiting_since_seconds"] = math.nan
            last = max(self.rows.end_seconds(row), float(mark["gone_seconds"]))
            if now_seconds >= last + longest_seconds:
                values["used"] = 0
        return found


def label_of(mark: np.void) -> str:
    """Who a mark is of."""
    return bytes(mark["label"]).decode(errors="replace")


def _file_bytes(limits: Sequence[PowerLimit]) -> int:
    return _HEADER_BYTES + CAPACITY * MARK.itemsize + table_bytes(CAPACITY, limits)


def _boot() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()[:36].ljust(36)
    except OSError:
        return b" " * 36


def _header(limits: Sequence[PowerLimit]) -> bytes:
    pairs = b"".join(_LIMIT.pack(x.watts, x.window_seconds) for x in limits)
    return _FIXED.pack(_MAGIC, *_SIZES, len(limits), _boot()) + pairs


class GroupFile:
    """A group's file by its name.

    Args:
        name: of the group; letters, digits and dashes.
        directory: where groups lie.

    Raises:
        FleetError: the directory can't be had, or others may open it.
    """

    def __init__(self, name: str, directory: Path | None = None) -> None:
        self.name = name
        folder = group_directory() if directory is None else directory
        self.path = folder / f"{name}.group"
        self._rm = f"rm {shlex.quote(str(self.path))}"
        if directory is None and folder.parent != _MEMORY:
            # A directory for temporary files may be a service's own, and the group with it.
            raise self.error(
                f"{_MEMORY} can't be written here, and it is where the engines of a host meet: "
                "make it writable (with a read-only root it is a mount of its own)"
            )
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError as error:
            raise self.error(f"{folder} can't be made: {error.strerror}") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise self.error(
                f"{folder} is no directory, another user's, or open to others: remove it, or "
                f"chmod 700 it if it is yours"
            )

    def error(self, text: str) -> FleetError:
        """An error that names the group."""
        return FleetError(f"power group {self.name}: {text}")

    def open(self, *, create: bool = False) -> ByteLocks:
        """A description of its own.

        Raises:
            FileNotFoundError: there is none, and `create` is false.
            FleetError: it is not to be believed, or can't be opened.
        """
        return ByteLocks(self._descriptor(os.O_CREAT if create else 0))

    def _descriptor(self, flags: int = 0) -> int:
        # Not through a link, and not waiting for the other end of a pipe.
        flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self.error(
                f"{self.path} can't be opened ({error.strerror}): if no server uses it, {self._rm}"
            ) from error
        found = os.fstat(descriptor)
        plain = stat.S_ISREG(found.st_mode)
        if not plain or found.st_uid != os.getuid() or found.st_mode & 0o077:
            os.close(descriptor)
            what = "is another user's, or open to others" if plain else "is no plain file"
            raise self.error(f"{self.path} {what}: if no server uses it, {self._rm}")
        return descriptor

    @contextlib.contextmanager
    def members(
        self, *, create: bool = False, wait_seconds: float | None = None
    ) -> Iterator[ByteLocks]:
        """No other engine joins, leaves or is removed inside this block.

        Args:
            create: make the file, if there is none.
            wait_seconds: for who is inside; by default as long as somebody may need.

        Raises:
            FileNotFoundError: there is no file, and `create` is false.
            FleetError: it is not to be believed, or somebody else is inside for longer.
        """
        wait_seconds = _JOIN_SECONDS if wait_seconds is None else wait_seconds
        deadline = time.monotonic() + wait_seconds
        while True:
            locks = self.open(create=create)
            try:
                while not locks.take(MEMBERSHIP):
                    if time.monotonic() >= deadline:
                        raise self.error(
                            f"another engine has been joining or leaving for {wait_seconds:g} s: "
                            f"is it stopped? See who has {self.path} open (fuser), then go on "
                            "with it or end it"
                        )
                    time.sleep(_POLL_SECONDS)
                # The last to leave may have removed it while this one waited.
                if self.same_file(locks):
                    yield locks
                    return
            finally:
                locks.close()

    def same_file(self, locks: ByteLocks) -> bool:
        """Whether these locks are on the file that has the group's name now."""
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return False
        own = os.fstat(locks.descriptor)
        return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)

    def limits(self, locks: ByteLocks) -> tuple[PowerLimit, ...] | None:
        """The limits in the file; None where they mean nothing any more. Inside `members`.

        Raises:
            FleetError: it is no group's file, or of another version and in use.
        """
        size, in_use = os.fstat(locks.descriptor).st_size, locks.held(ALIVE, 0)
        data = os.pread(locks.descriptor, _HEADER_BYTES, 0)
        if not in_use and not any(data):
            # New, or whoever began it died before the header was written.
            return None
        if len(data) < _HEADER_BYTES or not data.startswith(_MAGIC):
            raise self.error(f"{self.path} is no group's file: if no server uses it, {self._rm}")
        _, layout, *sizes, count, boot = _FIXED.unpack_from(data)
        if (layout, *sizes) != _SIZES:
            if in_use:
                raise self.error(
                    f"{self.path} is in use by engines of another version of the shaper "
                    f"(layout {layout}, this one has {LAYOUT}): stop them first, or give another "
                    "name"
                )
            return None
        if not in_use and boot != _boot():
            return None
        listed = range(count if count <= MAX_LIMITS else 0)
        pairs = [_LIMIT.unpack_from(data, _FIXED.size + i * _LIMIT.size) for i in listed]
        valid = bool(pairs) and all(
            0.0 < watts < math.inf and 0.0 < window <= 60.0 for watts, window in pairs
        )
        limits = tuple(PowerLimit(*pair) for pair in pairs) if valid else ()
        if not valid or size != _file_bytes(limits):
            raise self.error(
                f"{self.path} is damaged: stop the servers that use it, then {self._rm}"
            )
        return limits

    def check(
        self, locks: ByteLocks, limits: Sequence[PowerLimit]
    ) -> tuple[bool, tuple[PowerLimit, ...] | None]:
        """Whether somebody lives in the file, and its limits. Inside `members`.

        Raises:
            FleetError: somebody lives in it with other limits; or as from `limits`.
        """
        found, in_use = self.limits(locks), locks.held(ALIVE, 0)
        if in_use and found is not None and _ordered(found) != _ordered(limits):
            raise self.error(
                f"it lives with {named(found)}, and this engine was given {named(limits)}: give "
                "all its servers the same limits (and the same --host-overhead and "
                "--psu-efficiency), or this one another group"
            )
        return in_use, found

    def prepare(self, locks: ByteLocks, limits: Sequence[PowerLimit]) -> bool:
        """Begin the group, if no engine is in it with these limits. Inside `members`.

        Returns:
            Whether somebody does.

        Raises:
            FleetError: as from `check`; or there is no space for it.
        """
        in_use, found = self.check(locks, limits)
        if found is None or _ordered(found) != _ordered(limits):
            self._fill(locks, limits)
        return in_use

    def _fill(self, locks: ByteLocks, limits: Sequence[PowerLimit]) -> None:
        header, size = _header(limits), _file_bytes(limits)
        os.ftruncate(locks.descriptor, 0)
        try:
            # A page that can't be had later would end the process that writes it.
            os.posix_fallocate(locks.descriptor, 0, size)
        except OSError as error:
            self.remove()
            raise self.error(
                f"{self.path} needs {size / 2**20:.0f} MB: {error.strerror}; make room in "
                f"{self.path.parent.parent} (a container may need a larger --shm-size)"
            ) from error
        os.pwrite(locks.descriptor, header, 0)

    def map(self, limits: Sequence[PowerLimit]) -> SharedFile:
        """The file in memory."""
        descriptor = self._descriptor()
        try:
            return SharedFile(mmap.mmap(descriptor, _file_bytes(limits)), limits)
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Remove the file. Inside `members`."""
        self.path.unlink(missing_ok=True)
