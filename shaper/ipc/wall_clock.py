"""The wall clock, read in this one place.

Everything that measures or decides goes by the monotonic clock, which no operator
and no time server sets. The wall clock has two uses: a budget that an operator
states in calendar time (`at`, `until`, `daily`), and the time of a change in a log.
"""

from __future__ import annotations

import time


def wall_seconds() -> float:
    """Seconds since 1970-01-01 UTC, as this host believes. May jump either way."""
    return time.time()
