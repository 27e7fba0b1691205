"""Status blocks of engines on this host, found by the names of their files.

A server reads those of its own run (`shaper/ipc/status_block.py`); the doctor looks at all.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

from shaper.ipc.engine_record import Status, read_statuses
from shaper.ipc.status_block import block_directory

# The sampler beats 50 times a second.
_BEATS_SECONDS = 5.0
_NAME = re.compile(r"vllm-shaper-(\d+)-([0-9a-f]+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Block:
    """One engine's block, of this user."""

    run: str
    status: Status

    @property
    def pid(self) -> int:
        """Of the engine's process; 0 where the block does not say."""
        found = self.status.info.get("pid", 0)
        return found if isinstance(found, int) else 0

    @property
    def alive(self) -> bool:
        """Whether it beats, or its process is there; that of another container is not seen."""
        beat = self.status.record.at_seconds
        if beat is not None and time.monotonic() - beat < _BEATS_SECONDS:
            return True
        if self.pid <= 0:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def _names() -> list[re.Match[str]]:
    try:
        entries = sorted(os.listdir(block_directory()))
    except OSError:
        return []
    return [match for entry in entries if (match := _NAME.fullmatch(entry))]


def own_blocks() -> list[Block]:
    """Of this user's engines, those of dead ones too."""
    runs = dict.fromkeys(match[2] for match in _names() if int(match[1]) == os.getuid())
    return [Block(run, status) for run in runs for status in read_statuses(run)]


def other_users() -> list[int]:
    """User numbers of others who have engines here."""
    return sorted({int(match[1]) for match in _names()} - {os.getuid()})


def engine_pids() -> frozenset[int]:
    """Process numbers of this user's living engines."""
    return frozenset(block.pid for block in own_blocks() if block.alive)
