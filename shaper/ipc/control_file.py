"""The control file: how a change of budget or mode reaches the engines of a run.

An API server writes it, whole, beside the status blocks and renames it into place; the
sampler thread of each engine sees by its `stat` that it is another one, reads it and
acknowledges it in the engine's status block. It holds what has been asked for and is
still meant, not the steps that led there, so an engine that looks late, or starts late,
misses nothing. Nothing of vLLM is in between.

Only a plain file of this user that no other user may open, for this run, whole and newer
than the last one is believed. Any other is refused, logged once and changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from shaper.config.budget import Frozen, TermsConfig, first_line
from shaper.core.budget import BudgetChange, BudgetTerms, Source
from shaper.core.types import PowerBudget
from shaper.errors import ControlError
from shaper.ipc.status_block import block_paths, control_paths

logger = logging.getLogger(__name__)

Mode = Literal["on", "shadow", "off"]
Part = Literal["budget", "mode", "record"]
MODES: tuple[Mode, ...] = ("on", "shadow", "off")
# Some ten times what the longest request that is accepted takes.
MAX_FILE_BYTES = 256 * 1024


class Origin(Frozen):
    """Who asked for something, when and why."""

    sequence: int
    who: str
    why: str
    at: str
    """By the wall clock, for people."""

    def __str__(self) -> str:
        why = f": {self.why}" if self.why else ""
        return f"change {self.sequence} by {self.who}{why}"


def _terms(value: object) -> object:
    return value if isinstance(value, BudgetTerms) else TermsConfig.model_validate(value).terms()


def _terms_as_written(terms: BudgetTerms) -> dict[str, Any]:
    said = {key: value for key, value in asdict(terms).items() if value is not None}
    if said.get("ramp_watts_per_second") == math.inf:
        said["ramp_watts_per_second"] = "none"
    return said


Terms = Annotated[BudgetTerms, BeforeValidator(_terms), PlainSerializer(_terms_as_written)]
"""What a layer says, in JSON as an operator writes it."""


@pydantic_dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ChangeRecord(BudgetChange):
    """A change of the budget that was asked for and not cleared."""

    terms: Terms
    fallback: Terms | None = None


class RecordOrder(Frozen):
    """A recording that was asked for and not ended: `shaper/server/recordings.py`."""

    file: str
    """Its name in the recording directory."""
    until_monotonic_seconds: float
    sequence: int
    """Of the change that asked for it."""


class ControlRecord(Frozen):
    """All that a run's engines have been asked for; None: nothing, or it was taken back."""

    run: str
    sequence: int = Field(default=0, ge=0)
    budget: ChangeRecord | None = None
    mode: Mode | None = None
    record: RecordOrder | None = None
    origins: dict[Part, Origin] = Field(default_factory=dict)
    """Who asked last for each, or took it back."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for part in get_args(Part):
            if getattr(self, part) is not None and part not in self.origins:
                raise ValueError(f"it does not say who asked for its {part}")
        return self


class ControlFile:
    """The control file of one run."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.path, self._lock_path = control_paths(run)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other API server of the run changes the file inside this block."""
        descriptor = os.open(
            self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def write(self, record: ControlRecord) -> None:
        """Replace the file, at once for whoever reads it.

        Raises:
            OSError: the directory is full, or the name is taken by another user.
        """
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(record.model_dump_json(exclude_none=True).encode())
            temporary.replace(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def read(self) -> ControlRecord:
        """What the file says; without a file, nothing was ever asked for.

        Raises:
            ControlError: it is not to be believed; the message says why.
        """
        try:
            text = self._bytes()
        except FileNotFoundError:
            return ControlRecord(run=self.run)
        except OSError as error:
            raise ControlError(f"{self.path} can't be read: {error.strerror}") from error
        try:
            record = ControlRecord.model_validate(json.loads(text))
        except ValidationError as error:
            raise ControlError(f"{self.path} is no control file: {first_line(error)}") from error
        except (ValueError, RecursionError) as error:
            raise ControlError(f"{self.path} is no control file: {error}") from error
        if record.run != self.run:
            raise ControlError(f"{self.path} is of another run")
        return record

    def _bytes(self) -> bytes:
        # Not through a link, and not waiting for the other end of a pipe.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.path, flags)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ControlError(f"{self.path} is no plain file")
            if found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise ControlError(f"{self.path} is another user's, or open to others")
            if found.st_size > MAX_FILE_BYTES:
                raise ControlError(f"{self.path} has more than {MAX_FILE_BYTES} bytes")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_FILE_BYTES)
        finally:
            os.close(descriptor)


def sweep_control_files() -> None:
    """Remove this user's files of runs that have no engine any more: a killed server leaves
    its own. Call it after a `StatusWriter` has removed the blocks of such engines."""
    stem, _ = control_paths("")
    for path in stem.parent.glob(f"{stem.name}*"):
        run = path.name.removeprefix(stem.name).partition(".")[0]
        # A block that can't be read is another version's: its engine lives all the same.
        if not block_paths(run):
            with contextlib.suppress(OSError):
                path.unlink()


class Follower:
    """What an engine knows of its run's control file. One thread only."""

    def __init__(self, file: ControlFile) -> None:
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._logged: set[str] = set()
        self.record = ControlRecord(run=file.run)
        """The last one that was believed."""
        self.refused = 0
        """Files that were not believed."""

    def poll(self) -> bool:
        """Look at the file; whether `record` is another one now. Costs one `stat`.

        A file that has gone changes nothing: what was asked for is cleared by asking.
        """
        try:
            found = self._file.path.lstat()
        except OSError:
            return False
        signature = (found.st_ino, found.st_mtime_ns, found.st_size)
        if signature == self._seen:
            return False
        self._seen = signature
        try:
            record = self._file.read()
            if record.sequence <= self.record.sequence:
                raise ControlError(
                    f"{self._file.path} has the sequence {record.sequence}, which is not above "
                    f"{self.record.sequence}"
                )
        except ControlError as error:
            self.refuse(str(error))
            return False
        self.record = record
        return True

    def refuse(self, why: str) -> None:
        """Count something that is not believed, and log it the first time."""
        self.refused += 1
        if why not in self._logged:
            self._logged.add(why)
            logger.error("control file refused, nothing changes: %s", why)


@dataclass(frozen=True, slots=True)
class EngineControl:
    """What one engine has made of the control file and the schedule."""

    budget: PowerBudget
    mode: Mode
    source: Source
    seen_sequence: int
    """The last control file it has read."""
    taken_sequence: int
    """The last one it has followed; below `seen_sequence` when it refused that one."""
    refused: int
    next_change_seconds: float
    """When it will look again at the latest because time alone changes the budget, of the
    monotonic clock; infinity: never."""
