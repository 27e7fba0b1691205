"""Takes what an operator asks of a running server, checks it, and has the engines do it.

Knows no HTTP: `shaper/server/routes.py` brings requests here and turns a `RefusedError`
into an answer. A change is written to the control file under a lock, with the next
sequence number, and is done when every engine of this host has acknowledged that number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from shaper.config.budget import Duration, Frozen, Moment, TermsConfig, check_idle, check_pairs
from shaper.config.calendar_spans import iso
from shaper.config.model import format_error
from shaper.core.budget import BudgetTerms
from shaper.errors import ConfigError, ControlError
from shaper.ipc.control_file import (
    ChangeRecord,
    ControlFile,
    ControlRecord,
    EngineControl,
    Mode,
    ModeRecord,
    Origin,
)
from shaper.ipc.status_block import Status

logger = logging.getLogger(__name__)

_Request = TypeVar("_Request", bound="OperatorRequest")

# A sampler ticks every 20 ms, by its slowest setting every second; a driver call that takes
# longer than this is an engine that the operator must look at.
ACKNOWLEDGE_SECONDS = 5.0
_POLL_SECONDS = 0.01
MAX_DURATION_SECONDS = 366 * 86_400.0


class RefusedError(ControlError):
    """A request that is not done, or not by every engine.

    Args:
        status: of HTTP.
        code: a word for programs.
        message: for people; says what to do.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class OperatorRequest(Frozen):
    """Who asks, and why: as stated, for the log."""

    who: str = Field(default="", max_length=100)
    why: str = Field(default="", max_length=500)

    @field_validator("who", "why")
    @classmethod
    def _on_one_line(cls, text: str) -> str:
        # It goes into logs and onto terminals: no line breaks, no escape sequences.
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class BudgetRequest(TermsConfig, OperatorRequest):
    """`PUT /v1/shaper/budget`."""

    for_seconds: Duration | None = Field(default=None, alias="for")
    until: Moment | None = None
    fallback: TermsConfig | None = None

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        if self.terms() == BudgetTerms():
            raise ValueError(
                "the request says no limits: give limits, gpu_limits or ramp_watts_per_second"
            )
        if self.for_seconds is not None and self.until is not None:
            raise ValueError("for and until both say when it ends: give one of them")
        if self.for_seconds is not None and not 1.0 <= self.for_seconds <= MAX_DURATION_SECONDS:
            raise ValueError(f"for={self.for_seconds:g} s is outside 1 s to 366 days")
        if self.fallback is not None:
            if self.for_seconds is None and self.until is None:
                raise ValueError("fallback says what holds at the end: give for or until as well")
            if self.fallback.terms() == BudgetTerms():
                raise ValueError(
                    "its fallback says no limits: leave it out to return to what is configured"
                )
        return self


class ModeRequest(OperatorRequest):
    """`PUT /v1/shaper/mode`."""

    mode: Mode


class ClearRequest(OperatorRequest):
    """`DELETE /v1/shaper/budget`."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """The two clocks of a desk; the wall's is for calendar time and logs."""

    monotonic: Callable[[], float]
    wall: Callable[[], float]


class ControlService:
    """The desk of one API server.

    Args:
        file: of the run.
        read_statuses: the engines' status blocks.
        clocks: see there.
    """

    def __init__(
        self, file: ControlFile, read_statuses: Callable[[], Sequence[Status]], clocks: Clocks
    ) -> None:
        self.file, self.clocks = file, clocks
        self._read_statuses = read_statuses

    def statuses(self) -> list[Status]:
        """The engines of this host."""
        return list(self._read_statuses())

    def engines(self) -> list[Status]:
        """Those of them that can be controlled."""
        return [status for status in self.statuses() if status.values.get("control")]

    # --- requests; each returns the sequence number that every engine has acknowledged

    async def set_budget(self, body: object, address: str) -> int:
        """Put a change of the budget in force.

        Raises:
            RefusedError: 422 it is wrong in itself, 409 an engine can't keep it, 503 there is
                no engine or the file can't be written, 504 an engine did not acknowledge.
        """
        request = parsed(BudgetRequest, body)
        wall, now = self.clocks.wall(), self.clocks.monotonic()
        until = None if request.until is None else request.until.timestamp()
        if until is not None and until <= wall:
            raise RefusedError(
                422, "invalid_value", f"until={request.until} is over (it is {iso(wall)})"
            )
        engines = self.some_engines()
        self._check(request, engines)
        said = {"limits", "gpu_limits", "ramp_watts_per_second"}
        terms = TermsConfig(**request.model_dump(include=said))

        def change(record: ControlRecord, origin: Origin) -> dict[str, Any]:
            budget = ChangeRecord(
                terms=terms,
                until_wall_seconds=until,
                until_monotonic_seconds=None
                if request.for_seconds is None
                else now + request.for_seconds,
                fallback=request.fallback,
                origin=origin,
            )
            return {"budget": budget, "cleared": None}

        asked = request.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude={"who", "why"}
        )
        return await self.make(change, request, address, f"budget {asked}", engines)

    async def clear_budget(self, body: object, address: str) -> int:
        """Back to the configured and scheduled budget.

        Raises:
            RefusedError: as for `set_budget`.
        """
        request = parsed(ClearRequest, body)
        return await self.make(
            lambda record, origin: {"budget": None, "cleared": origin},
            request,
            address,
            "budget cleared",
            self.some_engines(),
        )

    async def set_mode(self, body: object, address: str) -> int:
        """Switch the shaper on, to shadow, or off.

        Raises:
            RefusedError: as for `set_budget`.
        """
        request = parsed(ModeRequest, body)
        return await self.make(
            lambda record, origin: {"mode": ModeRecord(mode=request.mode, origin=origin)},
            request,
            address,
            f"mode {request.mode}",
            self.some_engines(),
        )

    # --- how

    def some_engines(self) -> list[Status]:
        """The same, at least one.

        Raises:
            RefusedError: 503 there is none.
        """
        engines = self.engines()
        if not engines:
            raise RefusedError(
                503,
                "no_engine",
                "no engine of this server has a shaper that runs; its log says why",
            )
        return engines

    def _check(self, request: BudgetRequest, engines: Sequence[Status]) -> None:
        for status in engines:
            why = status.info.get("passes_through")
            if why and not status.info.get("unshaped_ok"):
                raise RefusedError(409, "unkept", f"nobody would keep the budget: {why}")
            gpu_count = int(str(status.info["gpu_count"]))
            idle_watts = float(str(status.info["idle_watts"]))
            try:
                check_pairs(request.terms(), gpu_count, "budget")
                check_idle(request.terms(), gpu_count, idle_watts, "budget")
                if request.fallback is not None:
                    check_pairs(request.fallback.terms(), gpu_count, "fallback")
                    check_idle(request.fallback.terms(), gpu_count, idle_watts, "fallback")
            except ConfigError as error:
                raise RefusedError(409, "infeasible", str(error)) from error

    async def make(
        self,
        change: Callable[[ControlRecord, Origin], dict[str, Any]],
        signed: OperatorRequest,
        address: str,
        what: str,
        engines: Sequence[Status],
    ) -> int:
        """Write a change to the control file and wait until every engine has acknowledged it.

        Args:
            change: the fields of the control file that become others.
            signed: who asks, and why.
            address: of who asks.
            what: is asked, for the log.
            engines: of this host.

        Raises:
            RefusedError: 503 the file can't be written, 504 an engine did not acknowledge.
        """
        who = f"{signed.who or 'unnamed'} ({address})"
        try:
            sequence = await asyncio.to_thread(self._write, change, who, signed.why, engines)
        except OSError as error:
            raise RefusedError(
                503, "not_written", f"the control file can't be written: {error.strerror}"
            ) from error
        logger.info("change %d by %s: %s; why: %s", sequence, who, what, signed.why or "not said")
        await self._acknowledged(sequence)
        return sequence

    def _write(
        self,
        change: Callable[[ControlRecord, Origin], dict[str, Any]],
        who: str,
        why: str,
        engines: Sequence[Status],
    ) -> int:
        with self.file.locked():
            try:
                record = self.file.read()
            except ControlError as error:
                # Whoever spoilt the file: what is asked for now is whole, and goes on from there.
                logger.error("the control file is replaced: %s", error)
                record = ControlRecord(run=self.file.run)
            seen = [_control(status).seen_sequence for status in engines]
            sequence = 1 + max([record.sequence, *seen])
            at = iso(self.clocks.wall())
            origin = Origin(sequence=sequence, who=who, why=why, at=at)
            changed = {"sequence": sequence, **change(record, origin)}
            self.file.write(record.model_copy(update=changed))
        return sequence

    async def _acknowledged(self, sequence: int) -> None:
        deadline = self.clocks.monotonic() + ACKNOWLEDGE_SECONDS
        while True:
            controls = {str(s.info["engine"]): _control(s) for s in self.engines()}
            waiting = [name for name, c in controls.items() if c.seen_sequence < sequence]
            if not waiting:
                break
            if self.clocks.monotonic() >= deadline:
                raise RefusedError(
                    504,
                    "not_acknowledged",
                    f"engine {', '.join(waiting)} did not acknowledge within "
                    f"{ACKNOWLEDGE_SECONDS:g} s; the change stands and is taken when its sampler "
                    "runs again (shaper_heartbeat_age_seconds); DELETE takes it back",
                )
            await asyncio.sleep(_POLL_SECONDS)
        # A later change may have replaced this one before every engine saw it.
        refused = [
            name
            for name, c in controls.items()
            if c.seen_sequence == sequence and c.taken_sequence < sequence
        ]
        if refused:
            raise RefusedError(
                409, "refused", f"engine {', '.join(refused)} refused the change; its log says why"
            )


def _control(status: Status) -> EngineControl:
    control = EngineControl.from_values(status.values["control"])
    assert control is not None  # `engines` has left out those without
    return control


def parsed(kind: type[_Request], body: object) -> _Request:
    """A request's body as what it should be.

    Raises:
        RefusedError: 422 it is wrong.
    """
    try:
        return kind.model_validate({} if body is None else body)
    except ValidationError as error:
        raise RefusedError(422, "invalid_value", format_error(error, kind)) from error
