"""The log of decisions: what an engine's scheduler decided, as JSON lines."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from pathlib import Path
from typing import TextIO

from shaper.core.types import Decision, Reason

logger = logging.getLogger(__name__)

# Polls of a held engine repeat these a thousand times a second; the first says it all.
_REPEATED = frozenset({Reason.PAUSE, Reason.PREFILL_OVERDUE, Reason.IDLE})
# A log that nobody drains must not eat the memory: a minute of steps.
_MAX_PENDING = 10_000


class DecisionLog:
    """Appends decisions to a file as JSON lines. `add` from one thread, `drain` from another."""

    def __init__(self, path: str | None) -> None:
        self._pending: deque[tuple[Decision, float | None]] = deque(maxlen=_MAX_PENDING)
        self._file: TextIO | None = Path(path).open("a") if path else None  # noqa: SIM115
        self._last: Reason | None = None

    def add(self, decision: Decision, meter_watts: float | None) -> None:
        """Remember a decision for the next `drain`."""
        if self._file is None:
            return
        if decision.reason in _REPEATED and decision.reason is self._last:
            return
        self._last = decision.reason
        self._pending.append((decision, meter_watts))

    def drain(self) -> None:
        """Write what is pending. A full disk costs the log, not the engine."""
        if self._file is None:
            return
        try:
            while self._pending:
                self._file.write(_line(*self._pending.popleft()))
            self._file.flush()
        except OSError as error:
            logger.error("the decision log ends here: %s", error)
            self._file = None

    def close(self) -> None:
        """Write what is pending and let go of the file."""
        self.drain()
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(decision: Decision, meter_watts: float | None) -> str:
    limits, headroom = decision.limits, decision.headroom_watts
    return (
        json.dumps(
            {
                "t": round(decision.at_seconds, 6),
                "reason": decision.reason.value,
                "applied": decision.applied,
                "run": limits.run,
                "limit_prefill_tokens": limits.prefill_tokens,
                "limit_decode_requests": limits.decode_requests,
                "wanted_prefill_tokens": decision.wanted_prefill_tokens,
                "decodes": decision.decode_requests,
                "prefill_tokens": decision.prefill_tokens,
                "predicted_seconds": round(decision.predicted.seconds, 6),
                "predicted_joules": round(decision.predicted.joules, 4),
                "predicted_watts": round(decision.predicted.watts, 1),
                "headroom_watts": round(headroom, 1) if math.isfinite(headroom) else None,
                "meter_watts": meter_watts,
            }
        )
        + "\n"
    )
