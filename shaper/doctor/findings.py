"""What the doctor finds, and the document that `--json` prints.

The document, `SCHEMA` 1. Names of checks and keys stay what they are; new ones may come.

    {"schema": 1, "version": "0.1.0", "verdict": "warn", "exit_code": 0,
     "counts": {"ok": 9, "warn": 1, "fail": 0},
     "findings": [{"section": "GPUs", "check": "gpu.limits", "subject": "GPU 0",
                   "status": "ok", "found": "...", "advice": null, "data": {...}}]}
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shaper import __version__

SCHEMA = 1
# What drivers, servers and environments say is repeated up to here.
_MOST_CHARACTERS = 400


class Status(enum.Enum):
    """How a check ended; the worst is the verdict of all."""

    OK = "ok"
    WARN = "warn"
    """It works, and an operator should know."""
    FAIL = "fail"
    """The shaper can't do its work until this is mended."""


_RANK = tuple(Status)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the screen.

    Raises:
        ValueError: something is wrong and there is no word on what to do, or the other way round.
    """

    section: str
    check: str
    """Its name in the document, like `gpu.limits`."""
    status: Status
    found: str
    advice: str | None = None
    """What to do; for `warn` and `fail` only, and always there."""
    subject: str = ""
    """Which of several, like `GPU 0`; empty where there is one."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The same in values for a machine, quantities with their unit in the name."""

    def __post_init__(self) -> None:
        if (self.status is Status.OK) != (self.advice is None):
            raise ValueError(f"{self.check} is {self.status.value} with advice {self.advice!r}")


class Checks:
    """Makes the findings of one section.

    Args:
        section: its heading.
        subject: see `Finding`.
    """

    def __init__(self, section: str, subject: str = "") -> None:
        self._section, self._subject = section, subject

    def ok(self, check: str, found: str, **data: Any) -> Finding:
        """A finding that asks for nothing."""
        return Finding(self._section, check, Status.OK, found, None, self._subject, data)

    def warn(self, check: str, found: str, advice: str, **data: Any) -> Finding:
        """A finding to know."""
        return Finding(self._section, check, Status.WARN, found, advice, self._subject, data)

    def fail(self, check: str, found: str, advice: str, **data: Any) -> Finding:
        """A finding to mend."""
        return Finding(self._section, check, Status.FAIL, found, advice, self._subject, data)


def plain(text: object, most: int = _MOST_CHARACTERS) -> str:
    """Somebody else's text on one line: no control character reaches the terminal."""
    words = " ".join(str(text).split())
    clean = "".join(letter if letter.isprintable() else "?" for letter in words)
    return clean if len(clean) <= most else f"{clean[: most - 3]}..."


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many ended each way."""
    return {status.value: sum(f.status is status for f in findings) for status in Status}


def verdict(findings: Sequence[Finding]) -> Status:
    """The worst of them; `OK` for none."""
    return max((f.status for f in findings), key=_RANK.index, default=Status.OK)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where something fails, 0 else. 2 is for a wrong command line, see `shaper.cli.main`."""
    return int(verdict(findings) is Status.FAIL)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The whole as JSON values; see the module."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "verdict": verdict(findings).value,
        "exit_code": exit_code(findings),
        "counts": counts(findings),
        "findings": [values(finding) for finding in findings],
    }


def values(finding: Finding) -> dict[str, Any]:
    """One finding as JSON values."""
    return {
        "section": finding.section,
        "check": finding.check,
        "subject": finding.subject or None,
        "status": finding.status.value,
        "found": plain(finding.found),
        "advice": None if finding.advice is None else plain(finding.advice),
        "data": _json(finding.data),
    }


def finding_of(found: Mapping[str, Any]) -> Finding:
    """The finding behind `values`.

    Raises:
        KeyError, TypeError, ValueError: these are not such values.
    """
    status, subject = Status(found["status"]), found["subject"] or ""
    return Finding(**{**found, "status": status, "subject": subject})


def _json(value: Any) -> Any:
    """JSON has no word for NaN and infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    return plain(value)


def json_object(text: str | bytes) -> dict[str, Any]:
    """What another program said; empty where it is no JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
