"""A recording that an operator asks for over HTTP: what may be asked, and how it is begun.

The request names a file and never a path. The engines make it anew in the server's recording
directory (`record_directory`), each its own, and none is ever written over.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from shaper.config.budget import Duration
from shaper.ipc.control_file import ControlRecord, Origin, RecordOrder
from shaper.ipc.recording_state import RecordingPhase, RecordingState
from shaper.ipc.status_block import Status
from shaper.recording.format import PARTIAL, path_of_rank, rows_path
from shaper.server.control_service import (
    ACKNOWLEDGE_SECONDS,
    ControlService,
    OperatorRequest,
    RefusedError,
    parsed,
)

MAX_SECONDS = 3600.0
"""A recording that is longer is planned: `--record FILE`."""
_POLL_SECONDS = 0.02
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.(csv|parquet)")


class RecordRequest(OperatorRequest):
    """`PUT /v1/shaper/record`."""

    file: str
    for_seconds: Duration = Field(default=60.0, alias="for", ge=1.0, le=MAX_SECONDS)

    @field_validator("file")
    @classmethod
    def _whole(cls, name: str) -> str:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(
                f"{name[:200]!r} is no name for a recording: write one like run-1.csv or "
                "run-1.parquet, of letters, digits, dots, underscores and hyphens, without a "
                "directory"
            )
        if name.endswith(PARTIAL):
            raise ValueError(f"names that end with {PARTIAL} are of recordings under way")
        return name


class EndRequest(OperatorRequest):
    """`DELETE /v1/shaper/record`."""


async def start_recording(
    desk: ControlService, body: object, address: str, directory: Path | None
) -> int:
    """Have every engine record.

    Args:
        desk: of this API server.
        body: a `RecordRequest`.
        address: of who asks.
        directory: where the engines write; None where this API server can't know it.

    Returns:
        The sequence number of the change; every engine has made its file.

    Raises:
        RefusedError: 422 it is wrong in itself, 409 one is under way or a file can't be made,
            503 there is no engine, 504 an engine did not begin. Nothing is recorded then.
    """
    request = parsed(RecordRequest, body)
    engines = desk.some_engines()
    if directory is not None:
        _check_files(directory, request.file, engines)
    now = desk.clocks.monotonic()

    def change(record: ControlRecord, origin: Origin) -> dict[str, Any]:
        _check_idle(record.record, desk, now)
        until = now + request.for_seconds
        order = RecordOrder(file=request.file, until_monotonic_seconds=until, origin=origin)
        return {"record": order}

    what = f"record {request.file} for {request.for_seconds:g} s"
    sequence = await desk.make(change, request, address, what, engines)
    try:
        await _begun(desk, sequence, request.file)
    except RefusedError:
        await stop_recording(desk, {"why": "it could not be begun"}, "server")
        raise
    return sequence


async def stop_recording(desk: ControlService, body: object, address: str) -> int:
    """End a recording before its time; its files are finished.

    Raises:
        RefusedError: as for a change of the budget.
    """
    request = parsed(EndRequest, body)
    return await desk.make(
        lambda record, origin: {"record": None},
        request,
        address,
        "recording ended",
        desk.some_engines(),
    )


def recording_states(engines: Sequence[Status]) -> dict[int, RecordingState]:
    """By rank."""
    return {
        int(str(status.info["engine"])): RecordingState.from_values(
            status.values.get("recording", ())
        )
        for status in engines
    }


def _check_idle(order: RecordOrder | None, desk: ControlService, now_seconds: float) -> None:
    states = recording_states(desk.engines()).values()
    under_way = any(state.phase is RecordingPhase.RECORDING for state in states) or any(
        state.phase is RecordingPhase.FINISHING for state in states
    )
    if order is not None and order.until_monotonic_seconds > now_seconds:
        # An engine that has not seen it yet will begin it.
        number = order.origin.sequence
        under_way = under_way or any(s.sequence < number for s in states)
    if under_way:
        raise RefusedError(
            409, "busy", "a recording is under way: wait for its end, or DELETE it (Ctrl-C there)"
        )


def _check_files(directory: Path, file: str, engines: Sequence[Status]) -> None:
    if not directory.is_dir():
        raise _refused(f"there is no directory {directory} on the server")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _refused(f"the server's user may not write in {directory}")
    if file.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
        raise RefusedError(409, "no_parquet", "the server has no pyarrow: ask for a .csv")
    for rank in recording_states(engines):
        path = path_of_rank(directory / file, rank)
        for taken in (path, rows_path(path)):
            if os.path.lexists(taken):
                raise RefusedError(
                    409, "exists", f"{taken} is there already on the server: give another name"
                )


def _refused(what: str) -> RefusedError:
    return RefusedError(
        409,
        "not_writable",
        f"{what}: start it with record_directory (SHAPER_RECORD_DIRECTORY) set to a directory in "
        "which it may write",
    )


async def _begun(desk: ControlService, sequence: int, file: str) -> None:
    deadline = desk.clocks.monotonic() + ACKNOWLEDGE_SECONDS
    while True:
        states = recording_states(desk.engines())
        for rank, state in states.items():
            if state.sequence == sequence and state.phase is RecordingPhase.FAILED:
                if state.error_number == errno.EBUSY:
                    why = "it records all the time (--record FILE)"
                else:
                    why = os.strerror(state.error_number)
                raise RefusedError(
                    409,
                    "not_recorded",
                    f"engine {rank} can't record {file}: {why}; its log says more",
                )
        waiting = [
            rank
            for rank, state in states.items()
            if state.sequence < sequence or state.phase is RecordingPhase.NONE
        ]
        if not waiting:
            return
        if desk.clocks.monotonic() >= deadline:
            names = ", ".join(str(rank) for rank in waiting)
            raise RefusedError(504, "not_begun", f"engine {names} did not begin to record")
        await asyncio.sleep(_POLL_SECONDS)
