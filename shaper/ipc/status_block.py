"""A block of shared memory per engine, and its reader.

The scheduler runs in vLLM's engine-core process and `/metrics` is served by the
API server's (one or several). Each engine's sampler thread writes one record
(`engine_record.py`) to a small file in `/dev/shm`; every API server maps the files of its
run and shows them. The record carries a sequence number, odd while it is written, so that a
reader never sees half an update. Nothing waits for anything.

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
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

RUN_VARIABLE = "_SHAPER_RUN_ID"
_HEADER_BYTES = 4096
# A group of 32 engines with 32 limits takes some 8,000.
_RECORD_BYTES = 32_768
_SIZE = _HEADER_BYTES + 8 + _RECORD_BYTES
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


class Block(NamedTuple):
    """One engine's block as it was read."""

    info: Mapping[str, object]
    record: bytes
    """Empty: nothing was written yet."""


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
        self._sequence = 0

    def write(self, record: bytes) -> None:
        """Replace the record. Call from one thread only.

        Raises:
            ValueError: it is too long; the block stays as it was.
        """
        if len(record) > _RECORD_BYTES:
            raise ValueError(f"a record of {len(record)} bytes in a block of {_RECORD_BYTES}")
        first = _HEADER_BYTES + 8
        struct.pack_into("<I", self._memory, _HEADER_BYTES, (self._sequence + 1) & 0xFFFFFFFF)
        struct.pack_into("<I", self._memory, _HEADER_BYTES + 4, len(record))
        self._memory[first : first + len(record)] = record
        self._sequence += 2
        struct.pack_into("<I", self._memory, _HEADER_BYTES, self._sequence & 0xFFFFFFFF)

    def close(self) -> None:
        """Remove the block. May be called twice."""
        self._closed()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _sweep() -> None:
    """Remove this user's blocks whose writer is gone: a killed engine leaves its own.

    A writer in another container has a number that is not known here, and holds its block. The
    header is enough to go by: a writer may have died in the middle of an update.
    """
    for path in block_directory().glob(_pattern("*", "*")):
        with contextlib.suppress(OSError, ValueError, struct.error):
            with path.open("rb") as file:
                pid = int(str(_info(file.read(_HEADER_BYTES))["pid"]))
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


def block_paths(run: str) -> list[Path]:
    """Where the blocks of a run's engines are, in the order of the engines."""
    found = block_directory().glob(_pattern(run, "*"))
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def read_blocks(run: str) -> list[Block]:
    """The blocks of a run's engines, in the order of the engines; none is an empty list."""
    blocks = []
    for path in block_paths(run):
        # An engine that is just starting or leaving is not an error.
        with contextlib.suppress(FileNotFoundError, ValueError, struct.error):
            blocks.append(_read(path))
    return blocks


def _read(path: Path) -> Block:
    with path.open("rb") as file, mmap.mmap(file.fileno(), _SIZE, prot=mmap.PROT_READ) as memory:
        return Block(_info(memory[:_HEADER_BYTES]), _read_record(memory))


def _info(header: bytes) -> Mapping[str, object]:
    (length,) = struct.unpack_from("<Q", header, 0)
    if not 0 < length <= _HEADER_BYTES - 8:
        raise ValueError("no status block begins like this")
    found: Mapping[str, object] = json.loads(header[8 : 8 + length])
    return found


def _read_record(memory: mmap.mmap) -> bytes:
    first = _HEADER_BYTES + 8
    for _ in range(_READ_TRIES):
        before, length = struct.unpack_from("<II", memory, _HEADER_BYTES)
        if before % 2 == 0 and length <= _RECORD_BYTES:
            record = memory[first : first + length]
            if struct.unpack_from("<I", memory, _HEADER_BYTES)[0] == before:
                return record
        time.sleep(0)  # let the writer finish
    raise ValueError("a writer died in the middle of an update")
