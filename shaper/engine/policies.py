"""Which policy a configuration names."""

from __future__ import annotations

from collections.abc import Callable

from shaper.core.policy import Policy
from shaper.core.policy.fixed import FixedPolicy
from shaper.core.policy.windowed import WindowedPlanner

POLICIES: dict[str, Callable[[], Policy]] = {
    "predictive": WindowedPlanner,
    "fixed": FixedPolicy,
}
"""Makes a new policy, by the name that the setting `policy` gives it."""
