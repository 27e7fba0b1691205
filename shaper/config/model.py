"""The one configuration object, frozen. `shaper/config/sources.py` has where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shaper.config.budget import (
    Duration,
    Frozen,
    Limits,
    Ramp,
    Seconds,
    TermsConfig,
    Watts,
    check_idle,
    check_pairs,
    loose_limits,
)
from shaper.config.group import (
    GroupTerms,
    check_group_binds,
    check_group_idle,
    check_membership,
    group_terms,
)
from shaper.config.schedule import ScheduleEntry, check_schedule
from shaper.config.suggest import suggest
from shaper.core.budget import BudgetPlan, BudgetTerms, Constraints, resolve
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError


def _no_baseline(value: object) -> object:
    if value in ("static", "reactive", "latency-chunk"):
        raise ValueError(f"{value!r} is for comparisons: shaper simulate --policy {value}")
    return value


@dataclass(frozen=True, slots=True)
class Flag:
    """Marks a setting that `shaper serve` has a flag for; the setting's docstring is its help."""

    name: str
    metavar: str | None = None


_WATTS_OVER_WINDOW = "WATTS@WINDOW"


class ShaperConfig(TermsConfig):
    """Everything an operator can set. All keys have defaults; no limit means no shaping."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limits: Annotated[Limits, Flag("--power-limit", _WATTS_OVER_WINDOW)] = ()
    """mean power that no window of this length may exceed, summed over the engine's GPUs, like
    560W@1s; may be given several times"""

    gpu_limits: Annotated[Limits, Flag("--gpu-limit", _WATTS_OVER_WINDOW)] = ()
    """the same for each GPU of the engine, like 650W@1s"""

    ramp_watts_per_second: Annotated[Ramp | None, Flag("--ramp-limit", "WATTS/SECOND")] = None
    """how much the mean power of 100 ms may rise within any second, like 200W/s"""

    schedule: tuple[ScheduleEntry, ...] = ()
    """Budgets that hold at their times in place of what is said above."""

    power_group: Annotated[str | None, Flag("--power-group", "NAME")] = None
    """share the group limits with the other engines of this host that name this group"""

    group_limits: Annotated[Limits, Flag("--group-limit", _WATTS_OVER_WINDOW)] = ()
    """the same for all engines of the group together, like 4000W@100ms; all must be given the
    same"""

    host_overhead_watts: Annotated[Watts | None, Flag("--host-overhead", "WATTS")] = None
    """group limits are of the server at the wall, and this is what it draws behind its power
    supplies besides its GPUs, like 1800W; with --psu-efficiency"""

    psu_efficiency_ratio: Annotated[float | None, Flag("--psu-efficiency", "RATIO")] = None
    """the share of the power at the wall that its power supplies pass on, like 0.94"""

    itl_target_seconds: Annotated[Seconds | None, Flag("--itl-target", "TIME")] = None
    """promise at p99 of the time between two tokens, like 50ms: bounds the prefill chunk and the
    decode interval"""

    ttft_target_seconds: Annotated[Seconds | None, Flag("--ttft-target", "TIME")] = None
    """promise at p99 of the time to the first token, like 1s"""

    objective: Annotated[
        Literal["latency", "efficiency"], Flag("--objective", "{latency,efficiency}")
    ] = "latency"
    """latency (default): tokens wait only as the budget asks; efficiency: decodes wait up to the
    ITL target for larger steps, also without a budget, for fewer joules a token"""

    shadow: Annotated[bool, Flag("--shadow")] = False
    """predict, decide, record and expose everything, apply nothing"""

    policy: Annotated[
        Literal["predictive", "fixed"],
        BeforeValidator(_no_baseline),
        Flag("--policy", "{predictive,fixed}"),
    ] = "predictive"
    """predictive (default) is the shaper; fixed leaves vLLM alone"""

    force_version: Annotated[bool, Flag("--force-version")] = False
    """shape under a version of vLLM that was not tried"""

    unshaped_ok: Annotated[bool, Flag("--unshaped-ok")] = False
    """start also where no engine would keep the limit or the latency target (an engine, a model
    or a version that is not shaped); without it such a start is refused"""

    shape_heat: bool | None = None
    """Hold the GPUs below the temperature at which they slow down, with a power limit of its
    own. None: where there is anything to keep, since without that vLLM is left alone."""

    flex_max_wait_seconds: Duration = 600.0
    """Longest time that deferred flex work waits."""

    flex_on_timeout: Literal["run", "refuse"] = "run"
    """What becomes of flex work that has waited that long."""

    api_key_classes: dict[str, Literal["interactive", "flex"]] = Field(default={}, repr=False)
    """Class of work by API key; it goes before what a request says of itself."""

    margin_ratio: float = Field(default=0.01, ge=0.0, le=0.5)
    """Part of each limit that is kept free for the prediction's error."""

    max_pause_seconds: Seconds = Field(default=1.0, gt=0.0)
    """Longest time that work may be held back before it runs whatever the budget says."""

    sample_interval_seconds: Seconds = Field(default=0.02)
    """How often the GPUs are read."""

    sensor: Literal["nvml", "none"] = "nvml"
    """`none` predicts without reading any GPU, and keeps more of each limit free."""

    gpu_profile: Annotated[str | None, Flag("--gpu-profile", "NAME|PATH")] = None
    """predict with this profile; by default that of the GPU's own name"""

    decision_log: str | None = None
    """Path to which every decision is appended as a JSON line. None: not written."""

    record: Annotated[str | None, Flag("--record", "FILE")] = None
    """write what each step computed and took, and all readings, to FILE (.csv or .parquet)"""

    record_directory: str | None = None
    """Directory of recordings that are asked for over HTTP. None: the working directory."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, low, high in (
            ("itl_target_seconds", 0.001, 10.0),
            ("ttft_target_seconds", 0.01, 600.0),
            ("sample_interval_seconds", 0.005, 1.0),
            ("max_pause_seconds", 0.01, 60.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                hint = f"; if these are milliseconds, write {value / 1000:g}" * (value > high)
                raise ValueError(f"{name}={value:g} is outside {low:g} to {high:g} seconds{hint}")
        if not 1.0 <= self.flex_max_wait_seconds <= 86_400:
            raise ValueError(
                f"flex_max_wait_seconds={self.flex_max_wait_seconds:g} is outside 1 s to a day"
            )
        if self.objective == "efficiency" and self.itl_target_seconds is None:
            raise ValueError(
                "objective 'efficiency' spends the ITL target and none is given: "
                "set itl_target_seconds (--itl-target 50ms)"
            )
        check_schedule(self.schedule)
        if self.group is not None:
            check_membership(self.group.name, self.policy, self.sample_interval_seconds)
        return self

    @property
    def recording_directory(self) -> Path:
        """Where a recording that is asked for over HTTP goes, as an absolute path."""
        return Path(self.record_directory or ".").absolute()

    @property
    def group(self) -> GroupTerms | None:
        """The power group, with its limits in watts of the GPUs; None: this engine is in none."""
        return group_terms(
            self.power_group,
            self.group_limits,
            self.host_overhead_watts,
            self.psu_efficiency_ratio,
        )

    @property
    def limits_power(self) -> bool:
        """Whether power is limited, now or at a time of the schedule, alone or in a group."""
        unlimited = BudgetPlan(BudgetTerms((), (), math.inf))
        return self.budget_plan != unlimited or self.power_group is not None

    @property
    def asks_for_shaping(self) -> bool:
        """Whether there is anything to keep: then a shaper that can't run stops the start."""
        targets = (self.itl_target_seconds, self.ttft_target_seconds)
        return self.limits_power or any(target is not None for target in targets)

    def shapes_heat(self, constraints: Constraints) -> bool:
        """Whether heat may limit power.

        Args:
            constraints: what limits the engine now, which may have been set while it runs.
        """
        if self.shape_heat is not None:
            return self.shape_heat
        return self.asks_for_shaping or constraints.asked

    def terms(self) -> BudgetTerms:
        """What is configured outside the schedule; every term says something."""
        ramp = self.ramp_watts_per_second
        return BudgetTerms(self.limits, self.gpu_limits, math.inf if ramp is None else ramp)

    @property
    def budget_plan(self) -> BudgetPlan:
        """What is configured and what is scheduled; dated entries lie over daily ones."""
        ordered = sorted(self.schedule, key=lambda entry: entry.daily is None)
        return BudgetPlan(self.terms(), tuple(entry.scheduled() for entry in ordered))


_LIMIT_KEYS = tuple(field.name for field in fields(PowerLimit))
_KEYS_INSIDE: dict[str, tuple[str, ...]] = {
    "limits": _LIMIT_KEYS,
    "gpu_limits": _LIMIT_KEYS,
    "group_limits": _LIMIT_KEYS,
    "schedule": tuple(ScheduleEntry.model_fields),
    "fallback": tuple(TermsConfig.model_fields),
}
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def format_error(error: ValidationError, outside: type[Frozen]) -> str:
    """One line about the first mistake, or the first unknown key, that says what to do.

    Args:
        error: what pydantic found in `outside`.
        outside: whose keys are the known ones, where no inner value is at fault.
    """
    details = error.errors()
    unknown = (each for each in details if each["type"] in _UNKNOWN_KEY)
    detail = next(unknown, details[0])
    where = ".".join(str(part) for part in detail["loc"])
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in _UNKNOWN_KEY:
        known = [field.alias or name for name, field in outside.model_fields.items()]
        inside = [_KEYS_INSIDE[part] for part in detail["loc"] if part in _KEYS_INSIDE]
        known = [*inside[-1]] if inside else known
        message = f"unknown key; {suggest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"{where} is missing"
    given = "" if detail["type"] == "value_error" else f" (given: {_short(detail['input'])})"
    return f"{f'{where}: ' if where else ''}{message}{given}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def build_config(settings: Mapping[str, Any], source: str = "power_shaper") -> ShaperConfig:
    """A config from a mapping.

    Args:
        settings: keys of `ShaperConfig`.
        source: where they come from; named in messages.

    Raises:
        ConfigError: with the key, the value and the fix.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{source} must be an object of keys, not {settings!r}")
    for key in settings:
        if key == "admin_key":
            raise ConfigError(
                f"{source}: admin_key would be seen there by others: give it in the environment "
                "variable SHAPER_ADMIN_KEY, or in a file for --power-shaper-config"
            )
        if key not in ShaperConfig.model_fields:
            raise ConfigError(
                f"{source} has an unknown key {key!r}; {suggest(key, ShaperConfig.model_fields)}"
            )
    try:
        return ShaperConfig(**settings)
    except ValidationError as error:
        raise ConfigError(f"{source}: {format_error(error, ShaperConfig)}") from error


def check_floor(config: ShaperConfig, idle_watts: float, gpu_count: int = 1) -> None:
    """Refuse a limit, now, of the schedule or of the group, that an idle engine would break.

    Args:
        config: the settings.
        idle_watts: what the engine's GPUs draw together between steps.
        gpu_count: how many they are.

    Raises:
        ConfigError: naming the limit and the idle power.
    """
    for terms, where in _layers(config):
        check_idle(terms, gpu_count, idle_watts, where)
    if config.group is not None:
        check_group_idle(config.group, idle_watts)


def check_gpu_limits(config: ShaperConfig, gpu_count: int) -> None:
    """Refuse limits of the engine, of each GPU and of the group of which one can never bind.

    Raises:
        ConfigError: naming the two.
    """
    for terms, where in _layers(config):
        check_pairs(terms, gpu_count, where)
        if config.group is not None:
            check_group_binds(config.group, resolve(terms, gpu_count).limits)


def loose_settings(config: ShaperConfig, enforced_watts: float, gpu_count: int) -> list[str]:
    """A warning for each limit, now or of the schedule, that the driver's power cap already holds.

    Args:
        config: the settings.
        enforced_watts: the driver's enforced limits of the engine's GPUs, summed.
        gpu_count: how many they are.
    """
    return [
        warning
        for terms, where in _layers(config)
        for warning in loose_limits(terms, gpu_count, enforced_watts, where)
    ]


def _layers(config: ShaperConfig) -> list[tuple[BudgetTerms, str]]:
    entries = [(entry.terms(), f"schedule: {entry.name}") for entry in config.schedule]
    return [(config.terms(), "budget"), *entries]
