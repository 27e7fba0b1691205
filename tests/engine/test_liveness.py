"""Liveness under anything, as a stateful machine; see `tests/engine/machine.py` for its law.

`HYPOTHESIS_PROFILE=long pytest tests/engine/test_liveness.py` runs it for hours, with
other examples each time; the default is short and the same each time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.engine.machine import Liveness

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
EXAMPLES = int(os.environ.get("LIVENESS_EXAMPLES", "20000" if LONG else "150"))

TestLiveness = Liveness.TestCase
TestLiveness.__doc__ = "No sequence of events stops a request, leaks, or leaves work asleep."
TestLiveness.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60 if LONG else 25,
    derandomize=not LONG,
    deadline=None,
    # A step of the machine runs many of the engine's.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
