"""What a rack can't be run with, said before anything is built."""

from __future__ import annotations

from typing import Any

from shaper.config.budget import loose_limits
from shaper.config.model import ShaperConfig, build_config
from shaper.core.budget import BudgetTerms
from shaper.core.model.work import WorkCoefficients
from shaper.emulator.clocks import check_power_cap
from shaper.emulator.shapes import load_shape
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.simulate.policies import new_policy
from shaper.simulate.setup import RackSetup

# An engine's tables take some tens of megabytes.
MAX_ENGINES = 256


def shaper_config(setup: RackSetup) -> ShaperConfig:
    """The settings that each engine of this rack would be started with.

    Raises:
        ConfigError: as of a live engine.
    """
    settings: dict[str, Any] = {
        "objective": setup.objective,
        "limits": [{"watts": x.watts, "window_seconds": x.window_seconds} for x in setup.limits],
        "itl_target_seconds": setup.itl_target_seconds,
        "ttft_target_seconds": setup.ttft_target_seconds,
        "margin_ratio": setup.margin_ratio,
        "max_pause_seconds": setup.max_pause_seconds,
    }
    return build_config(settings, "shaper simulate")


def check_setup(setup: RackSetup) -> None:
    """Refuse what can't be run.

    Raises:
        ConfigError: with the setting and what it may be.
    """
    profile = load_profile(setup.gpu)
    shape = load_shape(setup.model)
    if not 1 <= setup.engines <= MAX_ENGINES or setup.tensor_parallel < 1:
        raise ConfigError(f"a rack has 1 to {MAX_ENGINES} engines, and an engine at least a GPU")
    if not 0.0 < setup.rate_scale < float("inf"):
        raise ConfigError(f"rate scale {setup.rate_scale:g} is not above 0")
    if not 1.0 <= setup.duration_seconds <= 86_400.0:
        raise ConfigError(f"a run of {setup.duration_seconds:g} s is outside 1 s to a day")
    if not 0.0 <= setup.warm_up_seconds <= setup.duration_seconds - 1.0:
        raise ConfigError(
            f"a warm-up of {setup.warm_up_seconds:g} s leaves less than a second of a run of "
            f"{setup.duration_seconds:g} s"
        )
    try:
        WorkCoefficients.from_shape(shape, setup.tensor_parallel)
    except ValueError as error:
        raise ConfigError(f"{setup.model}: {error}") from error
    if setup.gpu_power_cap_watts is not None:
        check_power_cap(profile, setup.gpu_power_cap_watts)
    clocks = profile.clocks
    hertz = setup.gpu_clock_hertz
    if hertz is not None and not clocks.sm_min_hertz <= hertz <= clocks.sm_max_hertz:
        raise ConfigError(
            f"a clock of {hertz / 1e6:g} MHz is outside {profile.name}'s range of "
            f"{clocks.sm_min_hertz / 1e6:g} to {clocks.sm_max_hertz / 1e6:g} MHz"
        )
    shaper_config(setup)
    new_policy(setup)
    _check_floor(setup)


def setup_warnings(setup: RackSetup) -> list[str]:
    """A warning for each limit that the emulated driver's power cap already holds."""
    gpus = setup.tensor_parallel
    each = setup.gpu_power_cap_watts or load_profile(setup.gpu).power.limit_watts
    together = gpus * setup.engines
    return [
        *loose_limits(BudgetTerms(setup.limits), gpus, each * gpus, "each engine"),
        *loose_limits(BudgetTerms(setup.group_limits), together, each * together, "group"),
    ]


def floor_watts(setup: RackSetup) -> float:
    """What each engine draws between steps, all its GPUs."""
    return load_profile(setup.gpu).power.gap_watts * setup.tensor_parallel


def _check_floor(setup: RackSetup) -> None:
    floor = floor_watts(setup)
    for limits, engines, whose in (
        (setup.limits, 1, "an engine"),
        (setup.group_limits, setup.engines, f"the group of {setup.engines} engines"),
    ):
        for limit in limits:
            if limit.watts <= floor * engines:
                raise ConfigError(
                    f"power limit {limit} is not above the floor: {whose} draws "
                    f"{floor * engines:.0f} W between steps; give more"
                )
