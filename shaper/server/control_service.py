"""Does what an operator asks of a running server: each public method is a control route.

A change is checked, written to the control file under a lock with the next sequence number,
and done when every engine of this host has acknowledged that number. `routes.py` turns a
`RefusedError` into an answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from fastapi import Request

from shaper.config.budget import check_idle, check_pairs
from shaper.config.calendar_spans import iso
from shaper.config.model import ShaperConfig
from shaper.errors import ConfigError, ControlError
from shaper.ipc.control_file import (
    ChangeRecord,
    ControlFile,
    ControlRecord,
    EngineControl,
    Origin,
    Part,
    RecordOrder,
)
from shaper.ipc.engine_record import Status
from shaper.ipc.wall_clock import wall_seconds
from shaper.server import recordings
from shaper.server.requests import (
    BudgetRequest,
    ModeRequest,
    OperatorRequest,
    RecordRequest,
    RefusedError,
)
from shaper.server.state import State, describe_state

logger = logging.getLogger(__name__)

# A sampler ticks every 20 ms, by its slowest setting every second; a driver call that takes
# longer than this is an engine that the operator must look at.
ACKNOWLEDGE_SECONDS = 5.0
_POLL_SECONDS = 0.01
_UNSIGNED = OperatorRequest()

Make = Callable[[ControlRecord, int], object]


class ControlService:
    """Changes and shows what the engines of one run do.

    Args:
        file: the control file of the run.
        read_statuses: returns the engines' status blocks.
        config: the run's settings; None where this API server can't read them.
        clock: monotonic seconds, the engines' own.
        wall: seconds since 1970, for calendar time and logs.
    """

    def __init__(
        self,
        file: ControlFile,
        read_statuses: Callable[[], Sequence[Status]],
        config: ShaperConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = wall_seconds,
    ) -> None:
        self.config = config
        self._file, self._read_statuses = file, read_statuses
        self._clock, self._wall = clock, wall

    # --- the routes; their docstrings are shown in the OpenAPI document

    async def state(self) -> State:
        """What was asked for, what holds, and how each engine fares."""
        try:
            record, problem = self._file.read(), ""
        except ControlError as error:
            record, problem = None, str(error)
        wall, now = self._wall(), self._clock()
        return describe_state(record, problem, self._read_statuses(), self.config, wall, now)

    async def set_budget(self, asked: BudgetRequest, request: Request) -> State:
        """Put a budget in force; the answer comes when every engine holds it."""
        wall, now = self._wall(), self._clock()
        until = None if asked.until is None else asked.until.timestamp()
        if until is not None and until <= wall:
            raise RefusedError(
                422, "invalid_value", f"until={asked.until} is over (it is {iso(wall)})"
            )
        change = ChangeRecord(
            terms=asked.terms(),
            end_wall_seconds=until,
            end_seconds=None if asked.for_seconds is None else now + asked.for_seconds,
            fallback=None if asked.fallback is None else asked.fallback.terms(),
        )
        _check_kept(change, self._some_engines())
        words = asked.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude={"who", "why"}
        )
        return await self._change("budget", lambda *_: change, asked, request, f"budget {words}")

    async def clear_budget(self, request: Request, asked: OperatorRequest = _UNSIGNED) -> State:
        """Return to the configured and scheduled budget."""
        return await self._change("budget", lambda *_: None, asked, request, "budget cleared")

    async def set_mode(self, asked: ModeRequest, request: Request) -> State:
        """Switch the shaper on, to shadow, or off."""
        return await self._change(
            "mode", lambda *_: asked.mode, asked, request, f"mode {asked.mode}"
        )

    async def start_recording(self, asked: RecordRequest, request: Request) -> State:
        """Have every engine record; the answer comes when each has made its file."""
        engines = self._some_engines()
        if self.config is not None:
            recordings.check_files(self.config.recording_directory, asked.file, engines)
        now = self._clock()

        def order(record: ControlRecord, sequence: int) -> RecordOrder:
            recordings.check_idle(record.record, self._engines(), now)
            until = now + asked.for_seconds
            return RecordOrder(file=asked.file, until_monotonic_seconds=until, sequence=sequence)

        what = f"record {asked.file} for {asked.for_seconds:g} s"
        sequence = await self._write_and_wait("record", order, asked, _address(request), what)
        try:
            await self._wait(
                lambda: recordings.not_begun(self._engines(), sequence, asked.file),
                "not_begun",
                "engine {} did not begin to record",
            )
        except RefusedError:
            withdrawn = OperatorRequest(why="it could not be begun")
            await self._write_and_wait(
                "record", lambda *_: None, withdrawn, "server", "recording ended"
            )
            raise
        return await self._answer(sequence)

    async def stop_recording(self, request: Request, asked: OperatorRequest = _UNSIGNED) -> State:
        """End a recording before its time; its files are finished."""
        return await self._change("record", lambda *_: None, asked, request, "recording ended")

    # --- how

    def _engines(self) -> list[Status]:
        """The engines of this host that can be controlled."""
        return [status for status in self._read_statuses() if status.record.control is not None]

    def _some_engines(self) -> list[Status]:
        engines = self._engines()
        if not engines:
            raise RefusedError(
                503,
                "no_engine",
                "no engine of this server has a shaper that runs; its log says why",
            )
        return engines

    async def _change(
        self, part: Part, make: Make, asked: OperatorRequest, request: Request, what: str
    ) -> State:
        """`_write_and_wait`, and the state after it."""
        sequence = await self._write_and_wait(part, make, asked, _address(request), what)
        return await self._answer(sequence)

    async def _answer(self, sequence: int) -> State:
        return (await self.state()).model_copy(update={"sequence": sequence})

    async def _write_and_wait(
        self, part: Part, make: Make, asked: OperatorRequest, address: str, what: str
    ) -> int:
        """Change one part of the control file and wait until every engine has acknowledged it.

        Args:
            part: the part of the control file.
            make: its new value, from the control file and the sequence number of the change.
            asked: who asks, and why.
            address: of who asks.
            what: is asked, for the log.

        Returns:
            The sequence number of the change.

        Raises:
            RefusedError: 503 there is no engine or the file can't be written, 504 an engine did
                not acknowledge, 409 an engine refused.
        """
        engines = self._some_engines()
        who = f"{asked.who or 'unnamed'} ({address})"
        try:
            sequence = await asyncio.to_thread(self._write, part, make, who, asked.why, engines)
        except OSError as error:
            raise RefusedError(
                503, "not_written", f"the control file can't be written: {error.strerror}"
            ) from error
        logger.info("change %d by %s: %s; why: %s", sequence, who, what, asked.why or "not said")
        await self._wait(
            lambda: [
                name
                for name, control in _controls(self._engines()).items()
                if control.seen_sequence < sequence
            ],
            "not_acknowledged",
            f"engine {{}} did not acknowledge within {ACKNOWLEDGE_SECONDS:g} s; the change stands "
            "and is taken when its sampler runs again (shaper_heartbeat_age_seconds); DELETE "
            "takes it back",
        )
        # A later change may have replaced this one before every engine saw it.
        refused = [
            name
            for name, control in _controls(self._engines()).items()
            if control.seen_sequence == sequence and control.taken_sequence < sequence
        ]
        if refused:
            raise RefusedError(
                409, "refused", f"engine {', '.join(refused)} refused the change; its log says why"
            )
        return sequence

    def _write(self, part: Part, make: Make, who: str, why: str, engines: Sequence[Status]) -> int:
        with self._file.locked():
            try:
                record = self._file.read()
            except ControlError as error:
                # Whoever spoilt the file: what is asked for now is whole, and goes on from there.
                logger.error("the control file is replaced: %s", error)
                record = ControlRecord(run=self._file.run)
            seen = [control.seen_sequence for control in _controls(engines).values()]
            sequence = 1 + max([record.sequence, *seen])
            origin = Origin(sequence=sequence, who=who, why=why, at=iso(self._wall()))
            changed = {part: make(record, sequence), "origins": record.origins | {part: origin}}
            self._file.write(record.model_copy(update={"sequence": sequence, **changed}))
        return sequence

    async def _wait(self, waiting: Callable[[], list[str]], code: str, problem: str) -> None:
        """Until no engine is waited for.

        Raises:
            RefusedError: 504 it took too long.
        """
        deadline = self._clock() + ACKNOWLEDGE_SECONDS
        while names := waiting():
            if self._clock() >= deadline:
                raise RefusedError(504, code, problem.format(", ".join(names)))
            await asyncio.sleep(_POLL_SECONDS)


def _address(request: Request) -> str:
    return "?" if request.client is None else request.client.host


def _controls(engines: Sequence[Status]) -> dict[str, EngineControl]:
    """By the engine's name."""
    found = {str(status.info["engine"]): status.record.control for status in engines}
    return {name: control for name, control in found.items() if control is not None}


def _check_kept(change: ChangeRecord, engines: Sequence[Status]) -> None:
    """Every engine can keep the change.

    Raises:
        RefusedError: 409 one can't.
    """
    for status in engines:
        why = status.info.get("passes_through")
        if why and not status.info.get("unshaped_ok"):
            raise RefusedError(409, "unkept", f"nobody would keep the budget: {why}")
        gpu_count = int(str(status.info["gpu_count"]))
        idle_watts = float(str(status.info["idle_watts"]))
        try:
            for terms, where in ((change.terms, "budget"), (change.fallback, "fallback")):
                if terms is not None:
                    check_pairs(terms, gpu_count, where)
                    check_idle(terms, gpu_count, idle_watts, where)
        except ConfigError as error:
            raise RefusedError(409, "infeasible", str(error)) from error
