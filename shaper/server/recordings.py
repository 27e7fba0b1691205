"""What must be so before engines record a file that an operator asks for over HTTP.

The request names a file and never a path. The engines make it anew in the server's recording
directory (`record_directory`), each its own, and none is ever written over.
"""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from shaper.ipc.control_file import RecordOrder
from shaper.ipc.engine_record import Status
from shaper.ipc.recording_state import RecordingPhase, RecordingState
from shaper.recording.format import path_of_rank, rows_path
from shaper.server.requests import RefusedError

_UNDER_WAY = (RecordingPhase.RECORDING, RecordingPhase.FINISHING)


def recording_states(engines: Sequence[Status]) -> dict[int, RecordingState]:
    """By rank."""
    return {int(str(status.info["engine"])): status.record.recording for status in engines}


def check_idle(order: RecordOrder | None, engines: Sequence[Status], now_seconds: float) -> None:
    """No recording is under way, or ordered and not begun.

    Raises:
        RefusedError: 409 there is one.
    """
    states = recording_states(engines).values()
    under_way = any(state.phase in _UNDER_WAY for state in states)
    if order is not None and order.until_monotonic_seconds > now_seconds:
        # An engine that has not seen it yet will begin it.
        under_way = under_way or any(state.sequence < order.sequence for state in states)
    if under_way:
        raise RefusedError(
            409, "busy", "a recording is under way: wait for its end, or DELETE it (Ctrl-C there)"
        )


def check_files(directory: Path, file: str, engines: Sequence[Status]) -> None:
    """Every engine's file can be made in the recording directory.

    Raises:
        RefusedError: 409 the directory or the file forbids it.
    """
    why = None
    if not directory.is_dir():
        why = f"there is no directory {directory} on the server"
    elif not os.access(directory, os.W_OK | os.X_OK):
        why = f"the server's user may not write in {directory}"
    if why:
        fix = "start it with record_directory (SHAPER_RECORD_DIRECTORY) set to a directory in "
        raise RefusedError(409, "not_writable", f"{why}: {fix}which it may write")
    if file.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
        raise RefusedError(409, "no_parquet", "the server has no pyarrow: ask for a .csv")
    for rank in recording_states(engines):
        path = path_of_rank(directory / file, rank)
        for taken in (path, rows_path(path)):
            if os.path.lexists(taken):
                raise RefusedError(
                    409, "exists", f"{taken} is there already on the server: give another name"
                )


def not_begun(engines: Sequence[Status], sequence: int, file: str) -> list[str]:
    """The engines that have not begun the recording of this change yet.

    Raises:
        RefusedError: 409 one of them can't.
    """
    waiting = []
    for rank, state in recording_states(engines).items():
        if state.sequence == sequence and state.phase is RecordingPhase.FAILED:
            why = os.strerror(state.error_number)
            if state.error_number == errno.EBUSY:
                why = "it records all the time (--record FILE)"
            raise RefusedError(
                409, "not_recorded", f"engine {rank} can't record {file}: {why}; its log says more"
            )
        if state.sequence < sequence or state.phase is RecordingPhase.NONE:
            waiting.append(str(rank))
    return waiting
