"""Policies that the shaper is compared with: what else holds power or latency down.

`shaper simulate --policy NAME` finds them here (`shaper.simulate.policies`); no live engine
has them. Guard, levers, ledger and decision log are those of the planner.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.baselines.latency_chunk import LatencyChunk
from bench.baselines.reactive import ReactiveConcurrency
from bench.baselines.static import StaticCaps
from shaper.core.policy import Policy
from shaper.errors import ConfigError
from shaper.simulate.setup import RackSetup


def _static(setup: RackSetup) -> Policy:
    if setup.prefill_tokens_cap is None and setup.running_requests_cap is None:
        raise ConfigError(
            "policy 'static' has no cap: give --static-prefill-tokens or --static-running-requests"
        )
    return StaticCaps(setup.prefill_tokens_cap, setup.running_requests_cap)


def _reactive(setup: RackSetup) -> Policy:
    if not setup.limits:
        raise ConfigError("policy 'reactive' has no limit to react to: set limits")
    return ReactiveConcurrency()


def _latency_chunk(setup: RackSetup) -> Policy:
    if setup.itl_target_seconds is None:
        raise ConfigError("policy 'latency-chunk' has no target: give --itl-target")
    return LatencyChunk()


BASELINES: dict[str, Callable[[RackSetup], Policy]] = {
    "static": _static,
    "reactive": _reactive,
    "latency-chunk": _latency_chunk,
}
"""Makes a new policy of an engine. Raises ConfigError where the setup has not what it needs."""
