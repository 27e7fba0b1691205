"""What an operator may ask of a running server, and how a request is refused."""

from __future__ import annotations

import re
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from shaper.config.budget import Duration, Frozen, Moment, TermsConfig
from shaper.config.model import format_error
from shaper.core.budget import BudgetTerms
from shaper.errors import ControlError
from shaper.ipc.control_file import Mode
from shaper.recording.format import PARTIAL

_Request = TypeVar("_Request", bound="OperatorRequest")

MAX_DURATION_SECONDS = 366 * 86_400.0
MAX_RECORD_SECONDS = 3600.0
"""A recording that is longer is planned: `--record FILE`."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.(csv|parquet)")


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


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


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
    """A change of the budget."""

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
    """A mode of the shaper."""

    mode: Mode


class RecordRequest(OperatorRequest):
    """A recording, by the name of its file in the server's recording directory."""

    file: str
    for_seconds: Duration = Field(default=60.0, alias="for", ge=1.0, le=MAX_RECORD_SECONDS)

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


def parsed(kind: type[_Request], body: Any) -> _Request:
    """A request's body as what it should be.

    Raises:
        RefusedError: 422 it is wrong.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise RefusedError(422, "invalid_value", format_error(error, kind)) from error
