"""A fixed block of numbers per engine in shared memory, and its reader.

The scheduler runs in vLLM's engine-core process and `/metrics` is served by the
API server's (one or several). Each engine's sampler thread writes its numbers to a
small file in `/dev/shm`; every API server maps the files of its run and shows them.
A section carries a sequence number, odd while it is written, so that a reader never
shows half an update. Nothing waits for anything.

The run's id, chosen in the first process and inherited by the others through the
environment, ties an API server to its engines. Files are readable by their user only.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import mmap
import os
import secrets
import struct
import tempfile
import time
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RUN_VARIABLE = "_SHAPER_RUN_ID"
_HEADER_BYTES = 4096
_SECTION_SLOTS = 256
_SECTION_BYTES = 8 * (_SECTION_SLOTS + 1)
_SECTIONS = ("scheduler", "sampler", "control", "standing", "flex", "group", "recording", "parts")
_SIZE = _HEADER_BYTES + len(_SECTIONS) * _SECTION_BYTES
_READ_TRIES = 100


def run_id(environ: MutableMapping[str, str] = os.environ) -> str:
    """This run's id; the first process to ask chooses it for its children.

    That process also removes the run's blocks when it ends: vLLM may kill an engine
    before it gets to do so itself.
    """
    if RUN_VARIABLE not in environ:
        environ[RUN_VARIABLE] = secrets.token_hex(8)
        atexit.register(_remove_blocks, environ[RUN_VARIABLE], os.getpid())
    return environ[RUN_VARIABLE]


def _remove_blocks(run: str, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        blocks = block_directory().glob(_pattern(run, "*"))
        controls = block_directory().glob(f"{control_paths(run)[0].name}*")
        for path in (*blocks, *controls, refusal_path(run)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def control_paths(run: str) -> tuple[Path, Path]:
    """The run's control file and the lock beside it; see `shaper/ipc/control_file.py`."""
    stem = f"vllm-shaper-control-{os.getuid()}-{run}"
    return block_directory() / stem, block_directory() / f"{stem}.lock"


def refusal_path(run: str) -> Path:
    """Where an engine of this run says why it refused to start; see `shaper/engine/refusal.py`."""
    return block_directory() / f"vllm-shaper-refusal-{os.getuid()}-{run}"


def block_directory() -> Path:
    """Where blocks live: memory-backed if the machine has it."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def _pattern(run: str, engine: str) -> str:
    return f"vllm-shaper-{os.getuid()}-{run}-{engine}"


@dataclass(frozen=True, slots=True)
class Status:
    """One engine's block as it was read."""

    info: Mapping[str, object]
    values: Mapping[str, tuple[float, ...]]
    """By section, in the order in which the writer put them."""


class StatusWriter:
    """Creates and fills the block of one engine.

    Args:
        run: the run's id.
        engine: the engine's index among the data-parallel ranks.
        info: what does not change; at most some 4,000 bytes as JSON.
    """

    def __init__(self, run: str, engine: int, info: Mapping[str, object]) -> None:
        header = json.dumps({"pid": os.getpid(), "engine": engine, **info}).encode()
        if len(header) > _HEADER_BYTES - 8:
            raise ValueError(f"status info takes {len(header)} bytes of {_HEADER_BYTES - 8}")
        _sweep()
        self.path = block_directory() / _pattern(run, str(engine))
        # A block left by a killed engine of this run is replaced, never reused.
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        # Open and locked as long as its process lives: its number means nothing elsewhere.
        self._closed = weakref.finalize(self, os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.ftruncate(descriptor, _SIZE)
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._memory[8 : 8 + len(header)] = header
        struct.pack_into("<Q", self._memory, 0, len(header))
        self._sequence = dict.fromkeys(_SECTIONS, 0)

    def write(self, section: str, values: Sequence[float]) -> None:
        """Replace a section's numbers. Call from one thread only.

        Raises:
            ValueError, struct.error: these are no such numbers; the section stays as it was.
        """
        if len(values) > _SECTION_SLOTS:
            raise ValueError(f"{len(values)} numbers for {_SECTION_SLOTS} slots of {section}")
        packed = struct.pack(f"<{len(values)}d", *values)
        offset = _HEADER_BYTES + _SECTIONS.index(section) * _SECTION_BYTES
        sequence = self._sequence[section] + 1
        struct.pack_into("<II", self._memory, offset, sequence & 0xFFFFFFFF, len(values))
        self._memory[offset + 8 : offset + 8 + len(packed)] = packed
        self._sequence[section] = sequence = sequence + 1
        struct.pack_into("<I", self._memory, offset, sequence & 0xFFFFFFFF)

    def close(self) -> None:
        """Remove the block. May be called twice."""
        self._closed()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _sweep() -> None:
    """Remove this user's blocks whose writer is gone: a killed engine leaves its own.

    A writer in another container has a number that is not known here, and holds its block.
    """
    for path in block_directory().glob(_pattern("*", "*")):
        with contextlib.suppress(OSError, ValueError, struct.error):
            pid = int(str(_read(path).info["pid"]))
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                if not _held(path):
                    path.unlink()


def _held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_statuses(run: str) -> list[Status]:
    """The blocks of a run's engines, in the order of the engines; none is an empty list."""
    paths = sorted(
        block_directory().glob(_pattern(run, "*")), key=lambda path: int(path.name.split("-")[-1])
    )
    statuses = []
    for path in paths:
        # An engine that is just starting or leaving is not an error.
        with contextlib.suppress(FileNotFoundError, ValueError, struct.error):
            statuses.append(_read(path))
    return statuses


def _read(path: Path) -> Status:
    with path.open("rb") as file, mmap.mmap(file.fileno(), _SIZE, prot=mmap.PROT_READ) as memory:
        (length,) = struct.unpack_from("<Q", memory, 0)
        if not 0 < length <= _HEADER_BYTES - 8:
            raise ValueError(f"{path} is not a status block")
        info = json.loads(memory[8 : 8 + length])
        values = {
            section: _read_section(memory, _HEADER_BYTES + index * _SECTION_BYTES)
            for index, section in enumerate(_SECTIONS)
        }
    return Status(info=info, values=values)


def _read_section(memory: mmap.mmap, offset: int) -> tuple[float, ...]:
    for _ in range(_READ_TRIES):
        before, count = struct.unpack_from("<II", memory, offset)
        if before % 2 == 0 and count <= _SECTION_SLOTS:
            values = struct.unpack_from(f"<{count}d", memory, offset + 8)
            if struct.unpack_from("<I", memory, offset)[0] == before:
                return values
        time.sleep(0)  # let the writer finish
    raise ValueError("a writer died in the middle of an update")
