"""Reads the decision log that the server writes (`SHAPER_DECISION_LOG`)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_NUMBERS = {
    "times": "t",
    "prefill_tokens": "prefill_tokens",
    "limit_prefill_tokens": "limit_prefill_tokens",
    "decodes": "decodes",
    "predicted_watts": "predicted_watts",
    "predicted_seconds": "predicted_seconds",
    "headroom_watts": "headroom_watts",
    "meter_watts": "meter_watts",
}


@dataclass(frozen=True, slots=True)
class DecisionLog:
    """The decisions of one run, oldest first; every array is [decisions].

    `times` are monotonic seconds; NaN stands where the log has no number.
    """

    reasons: tuple[str, ...]
    times: FloatArray
    decodes: FloatArray
    prefill_tokens: FloatArray
    limit_prefill_tokens: FloatArray
    predicted_watts: FloatArray
    predicted_seconds: FloatArray
    headroom_watts: FloatArray
    meter_watts: FloatArray
    skipped_lines: int = 0
    """Lines that hold no decision, such as one cut off when the server ended."""

    def between(self, from_seconds: float, to_seconds: float) -> DecisionLog:
        """The decisions of a run, by its start and end (monotonic)."""
        keep = (self.times >= from_seconds) & (self.times <= to_seconds)
        reasons = tuple(r for r, kept in zip(self.reasons, keep, strict=True) if kept)
        arrays = {name: getattr(self, name)[keep] for name in _NUMBERS}
        return DecisionLog(reasons, **arrays, skipped_lines=self.skipped_lines)


def read_decision_log(path: Path) -> DecisionLog | None:
    """The log, or None where the server wrote none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return None
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and math.isfinite(_number(row.get("t"))):
            rows.append(row)
    if not rows:
        return None
    columns = {
        name: np.array([_number(row.get(key)) for row in rows]) for name, key in _NUMBERS.items()
    }
    reasons = tuple(str(row.get("reason", "unknown")) for row in rows)
    return DecisionLog(reasons, **columns, skipped_lines=len(lines) - len(rows))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
