"""The policy of a simulated engine, by name: the live engine's, and baselines to compare with.

Baselines are in `bench.baselines`, which is part of a clone and of no wheel.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from shaper.core.policy import Policy
from shaper.engine.policies import POLICIES
from shaper.errors import ConfigError
from shaper.simulate.setup import RackSetup

POLICY_NAMES = ("predictive", "fixed", "static", "reactive", "latency-chunk")


def new_policy(setup: RackSetup) -> Policy:
    """A new policy of one engine; policies remember, so each engine has its own.

    Raises:
        ConfigError: the setup has not what the policy needs, or the baseline is not there.
    """
    if setup.policy in POLICIES:
        return POLICIES[setup.policy]()
    return _baselines(setup.policy)[setup.policy](setup)


def _baselines(name: str) -> Mapping[str, Callable[[RackSetup], Policy]]:
    # The `shaper` script of a clone's environment does not have the clone's root on its path.
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.append(root)
    try:
        found: Mapping[str, Callable[[RackSetup], Policy]] = importlib.import_module(
            "bench.baselines"
        ).BASELINES
    except ImportError as error:
        raise ConfigError(
            f"policy {name!r} is a baseline of the repository's bench/ folder, which is not in "
            "the installed package: run shaper simulate from a clone"
        ) from error
    return found
