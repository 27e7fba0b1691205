"""Liveness under anything, as a stateful machine; see `tests/engine/machine.py` for its law.

`HYPOTHESIS_SCALE=400 pytest tests/engine/test_liveness.py` runs it for hours, with other
examples each time; the default is short and the same each time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.conftest import SCALE
from tests.engine.machine import Liveness

EXAMPLES = int(os.environ.get("LIVENESS_EXAMPLES", str(round(50 * SCALE))))

TestLiveness = Liveness.TestCase
TestLiveness.__doc__ = "No sequence of events stops a request, leaks, or leaves work asleep."
TestLiveness.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25 if SCALE == 1 else 60,
    derandomize=SCALE == 1,
    # A step of the machine runs many of the engine's.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
