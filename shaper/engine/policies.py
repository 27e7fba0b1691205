"""Which policy a configuration names."""

from __future__ import annotations

from collections.abc import Callable

from shaper.config.model import ShaperConfig
from shaper.core.policy import Policy
from shaper.core.policy.fixed import FixedPolicy
from shaper.core.policy.latency_chunk import LatencyChunk
from shaper.core.policy.reactive import ReactiveConcurrency
from shaper.core.policy.static import StaticCaps
from shaper.core.policy.windowed import WindowedPlanner


def _static(config: ShaperConfig) -> Policy:
    caps = config.static_caps
    return StaticCaps(caps.prefill_tokens, caps.running_requests)


POLICIES: dict[str, Callable[[ShaperConfig], Policy]] = {
    "predictive": lambda config: WindowedPlanner(),
    "fixed": lambda config: FixedPolicy(),
    "static": _static,
    "reactive": lambda config: ReactiveConcurrency(),
    "latency-chunk": lambda config: LatencyChunk(),
}
"""Makes a new policy, by the name that the setting `policy` gives it."""
