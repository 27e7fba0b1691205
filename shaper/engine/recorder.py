"""Records an engine's steps and samples while somebody wants it.

The scheduler's thread and the sampler's append to queues that are bounded; a thread of the
recording makes the file, writes and finishes it. So a full disk, a directory that hangs or
a mistake in here costs rows and is counted, and touches neither a step nor a reading. Parquet
is made by a process of its own: its library would hold this one's lock for too long.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shaper.core.types import GpuSample
from shaper.errors import TraceError
from shaper.gpu.parts import Parts
from shaper.ipc.control_file import RecordOrder
from shaper.ipc.recording_state import RecordingPhase, RecordingState
from shaper.recording.format import PARTIAL, RecordedStep, RecordingWriter, path_of_rank

logger = logging.getLogger(__name__)

MAX_BYTES = 512 << 20
"""A recording that was asked for over HTTP ends here: two hours of a busy engine of 8 GPUs."""
LEAST_FREE_BYTES = 1 << 30
"""It also ends when its disk has less room than this: others write there, too."""
_WRITE_SECONDS = 0.2
# A minute of steps and of an 8-GPU engine's samples, while a disk hangs.
_MAX_PENDING = 20_000
# A file that is not finished by then stays as rows, which can be read.
_JOIN_SECONDS = 5.0
# Ends without clean-up: libraries with threads may abort in theirs, when the file is long whole.
_FINISH = (
    "import os, pathlib, sys; from shaper.recording.format import finish_rows; "
    "os.nice(10); finish_rows(pathlib.Path(sys.argv[1])); os._exit(0)"
)


class Recorder:
    """What an engine records: all the time (`record = FILE`), or when it is ordered to.

    Args:
        directory: where recordings go that are ordered.
        rank: of this engine; names its files.
        meta: what the first row says.
        always: file of a recording that lasts as long as the engine, and replaces what is there.
        parts: counts what fails here.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        meta: Mapping[str, Any],
        always: str | None = None,
        parts: Parts | None = None,
    ) -> None:
        self._directory, self._rank, self._meta = directory, rank, meta
        self._parts = Parts() if parts is None else parts
        self._order: RecordOrder | None = None
        self._sequence = 0
        self._refused: RecordingState | None = None
        self._job: _Job | None = None
        self._always = always is not None
        if always is not None:
            path = path_of_rank(always, rank)
            writer = RecordingWriter(path, meta)
            self._job = _Job(lambda: writer, RecordingState(), math.inf, live=False)

    def start(self) -> None:
        """Begin the recording that lasts as long as the engine, where there is one."""
        if self._job is not None:
            self._job.start()

    def add_step(self, step: RecordedStep) -> None:
        """Called by the scheduler's thread."""
        job = self._job
        if job is not None:
            job.add_step(step)

    def add_samples(self, samples: tuple[GpuSample, ...]) -> None:
        """Called by the sampler's thread."""
        job = self._job
        if job is not None:
            job.add_samples(samples)

    def follow(self, order: RecordOrder | None, now_seconds: float) -> None:
        """Do what the control file says now. Called by the sampler's thread; never raises."""
        if order == self._order:
            return
        self._order = order
        try:
            self._take(order, now_seconds)
        # The boundary: what else the tick does goes on.
        except Exception:
            self._parts.errors["recording"] += 1
            logger.exception("a recording could not be started or ended")

    def _take(self, order: RecordOrder | None, now_seconds: float) -> None:
        if order is None:
            if self._job is not None and not self._always:
                self._job.stop()
            return
        self._sequence = order.sequence
        first = RecordingState(self._sequence)
        if order.until_monotonic_seconds <= now_seconds:
            self._refused = first  # this engine started when it was over
            return
        busy = self._job is not None and not self._job.state.over
        if busy:
            self._refused = RecordingState(
                self._sequence, RecordingPhase.FAILED, error_number=errno.EBUSY
            )
            return
        path = path_of_rank(self._directory / order.file, self._rank)
        self._refused, self._always = None, False
        self._job = _Job(
            lambda: RecordingWriter(path, self._meta, replace=False),
            first,
            order.until_monotonic_seconds,
            live=True,
        )
        self._job.start()

    @property
    def state(self) -> RecordingState:
        """Of the last recording that was ordered."""
        if self._refused is not None:
            return self._refused
        if self._job is None or self._always:
            return RecordingState()
        return self._job.state

    def close(self) -> None:
        """End it and finish the file; waits some seconds at most for what is pending."""
        if self._job is not None and self._job.is_alive():
            self._job.stop()
            self._job.join(_JOIN_SECONDS)


class _Job(threading.Thread):
    """One recording. `state` is replaced whole, so that any thread may read it."""

    def __init__(
        self,
        make: Callable[[], RecordingWriter],
        state: RecordingState,
        until_seconds: float,
        *,
        live: bool,
    ) -> None:
        super().__init__(name="shaper-recorder", daemon=True)
        self._make, self._until_seconds, self._live = make, until_seconds, live
        self._steps: deque[RecordedStep] = deque()
        self._samples: deque[GpuSample] = deque()
        self._stopping = threading.Event()
        self._dropped = 0
        self._done = False
        self.state = state

    def add_step(self, step: RecordedStep) -> None:
        """Remember a step; the queue's bound is what a disk that hangs may cost."""
        if self._done:
            return
        if len(self._steps) < _MAX_PENDING:
            self._steps.append(step)
        else:
            self._dropped += 1

    def add_samples(self, samples: tuple[GpuSample, ...]) -> None:
        """Remember samples, likewise."""
        if self._done:
            return
        if len(self._samples) < _MAX_PENDING:
            self._samples.extend(samples)
        else:
            self._dropped += len(samples)

    def stop(self) -> None:
        """Write what is pending and finish."""
        self._stopping.set()

    def run(self) -> None:
        """The recording, from its first row to its last."""
        writer: RecordingWriter | None = None
        try:
            writer = self._make()
            self._write_until_over(writer)
            self._say(RecordingPhase.FINISHING, writer)
            if self._live:
                self._finish_elsewhere(writer)
            else:
                writer.close()
            self._say(RecordingPhase.ENDED, writer)
        except (OSError, TraceError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
            self._done = True
            logger.error("the recording ends here: %s", error)
            self._say(RecordingPhase.FAILED, writer, number)
        # The boundary of the thread: its state must say that it is over.
        except Exception:
            self._done = True
            logger.exception("the recording failed")
            self._say(RecordingPhase.FAILED, writer, errno.EIO)
        if writer is not None:
            writer.release()
        self._steps.clear()
        self._samples.clear()

    def _write_until_over(self, writer: RecordingWriter) -> None:
        over = False
        while not over:
            if self._live and _free_bytes(writer.rows_path) < LEAST_FREE_BYTES:
                raise OSError(errno.ENOSPC, f"less than {LEAST_FREE_BYTES >> 30} GiB left")
            self._say(RecordingPhase.RECORDING, writer)
            left = self._until_seconds - time.monotonic()
            over = self._stopping.wait(max(0.0, min(_WRITE_SECONDS, left)))
            over = over or time.monotonic() >= self._until_seconds
            steps = [self._steps.popleft() for _ in range(len(self._steps))]
            samples = [self._samples.popleft() for _ in range(len(self._samples))]
            writer.write(steps, samples)
            over = over or (self._live and writer.bytes >= MAX_BYTES)
        self._done = True

    def _finish_elsewhere(self, writer: RecordingWriter) -> None:
        writer.release()
        if writer.rows_path.name.endswith(PARTIAL):
            done = subprocess.run(
                [sys.executable, "-P", "-c", _FINISH, str(writer.rows_path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                check=False,
            )
            if done.returncode:
                why = " ".join(done.stderr.splitlines()[-1:])
                raise OSError(
                    errno.EIO, f"no Parquet was made, the rows are in {writer.rows_path}: {why}"
                )

    def _say(
        self, phase: RecordingPhase, writer: RecordingWriter | None, error_number: int = 0
    ) -> None:
        rows, size = (0, 0) if writer is None else (writer.rows, writer.bytes)
        self.state = RecordingState(
            self.state.sequence, phase, rows, size, self._dropped, error_number
        )


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path.parent)
    return found.f_bavail * found.f_frsize
