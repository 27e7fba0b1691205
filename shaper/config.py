"""The one configuration object, frozen, and the ways to write it down.

Settings come from three places; the first that names a key wins:

1. what was given: `--power-limit` and its sisters, `--power-shaper-config`
   (JSON, or a path to JSON or TOML), or vLLM's
   `additional_config["power_shaper"]`;
2. `SHAPER_CONFIG`, a whole JSON object (this is how `shaper serve` hands its
   flags to vLLM's processes, so that vLLM's `additional_config`, which is part
   of its compile-cache key, does not change with the budget);
3. `SHAPER_<KEY>`, one variable per key, e.g. `SHAPER_LIMITS=560W@1s,640W@100ms`.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shaper.core.types import PowerLimit
from shaper.errors import ConfigError
from shaper.units import parse_seconds, parse_watts

ADDITIONAL_CONFIG_KEY = "power_shaper"
CONFIG_VARIABLE = "SHAPER_CONFIG"
ENV_PREFIX = "SHAPER_"
EMULATION_VARIABLES = frozenset(
    {"SHAPER_EMULATE", "SHAPER_EMULATE_TRACE", "SHAPER_EMULATE_TIME_SCALE"}
)

MIN_WINDOW_SECONDS = 0.010
MAX_WINDOW_SECONDS = 60.0
# The largest rack-scale server draws about 15 kW; more than this is a unit mistake.
MAX_WATTS = 200_000.0

Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Watts = Annotated[float, BeforeValidator(parse_watts)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LimitConfig(_Frozen):
    """`watts`, averaged over any `window_seconds`, summed over the engine's GPUs."""

    watts: Watts
    window_seconds: Seconds

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.watts <= 0:
            raise ValueError(f"watts={self.watts:g} must be above 0")
        if self.watts > MAX_WATTS:
            raise ValueError(
                f"watts={self.watts:g} is over {MAX_WATTS:g}: if these are milliwatts, "
                f"write {self.watts / 1000:g}"
            )
        if self.window_seconds > MAX_WINDOW_SECONDS:
            raise ValueError(
                f"window_seconds={self.window_seconds:g} is over {MAX_WINDOW_SECONDS:g}: "
                f"if these are milliseconds, write {self.window_seconds / 1000:g}"
            )
        if self.window_seconds < MIN_WINDOW_SECONDS:
            raise ValueError(
                f"window_seconds={self.window_seconds:g} is below {MIN_WINDOW_SECONDS:g}: "
                "a step of the engine is the smallest thing that can be shaped; "
                "give a window of 10 ms or more"
            )
        return self

    def as_limit(self) -> PowerLimit:
        """The same as the core's value."""
        return PowerLimit(self.watts, self.window_seconds)


def parse_power_limit(text: str) -> LimitConfig:
    """A limit from `560W@1s`.

    Raises:
        ConfigError: the text is no limit; the message says how to write one.
    """
    watts, at, window = text.partition("@")
    if not at:
        raise ConfigError(
            f"power limit {text!r} has no window: a limit holds over a window, write 560W@1s"
        )
    try:
        return LimitConfig.model_validate({"watts": watts, "window_seconds": window})
    except ValidationError as error:
        raise ConfigError(f"power limit {text!r}: {_first_line(error)}") from error
    except ValueError as error:
        raise ConfigError(f"power limit {text!r}: {error}") from error


def _limits(value: object) -> object:
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        try:
            return tuple(parse_power_limit(v) if isinstance(v, str) else v for v in value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return value


class ShaperConfig(_Frozen):
    """Everything an operator can set. All keys have defaults; no limit means no shaping."""

    limits: Annotated[tuple[LimitConfig, ...], BeforeValidator(_limits)] = ()
    """Power limits of this engine, summed over its GPUs; all of them hold at once."""

    itl_target_seconds: Seconds | None = Field(default=None)
    """Longest step that decodes may wait behind: bounds the prefill chunk. None: no bound."""

    objective: Literal["latency", "efficiency"] = "latency"
    """`latency` lets tokens wait only as the budget asks; `efficiency` lets decodes wait up to
    the ITL target for larger steps, also without a budget: fewer joules a token."""

    shadow: bool = False
    """Predict, decide, record and expose everything, but apply nothing."""

    policy: Literal["predictive", "fixed"] = "predictive"
    """`predictive` is the windowed-energy planner; `fixed` leaves vLLM alone."""

    margin_ratio: float = Field(default=0.005, ge=0.0, le=0.5)
    """Part of each limit that is kept free for the prediction's error."""

    max_pause_seconds: Seconds = Field(default=1.0, gt=0.0)
    """Longest time that work may be held back before it runs whatever the budget says."""

    sample_interval_seconds: Seconds = Field(default=0.02)
    """How often the GPUs are read."""

    sensor: Literal["nvml", "none"] = "nvml"
    """`none` predicts without reading any GPU, and keeps more of each limit free."""

    gpu_profile: str | None = None
    """Name or path of the GPU profile to predict with. None: by the GPU's own name."""

    decision_log: str | None = None
    """Path to which every decision is appended as a JSON line. None: not written."""

    record: str | None = None
    """Path (.csv or .parquet) of a recording of steps and samples, for `shaper fit`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, low, high in (
            ("itl_target_seconds", 0.001, 10.0),
            ("sample_interval_seconds", 0.005, 1.0),
            ("max_pause_seconds", 0.01, 60.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                hint = f"; if these are milliseconds, write {value / 1000:g}" * (value > high)
                raise ValueError(f"{name}={value:g} is outside {low:g} to {high:g} seconds{hint}")
        if self.objective == "efficiency" and self.itl_target_seconds is None:
            raise ValueError(
                "objective 'efficiency' spends the ITL target and none is given: "
                "set itl_target_seconds (--itl-target 50ms)"
            )
        ordered = sorted(self.limits, key=lambda limit: (limit.window_seconds, limit.watts))
        for short, long in pairwise(ordered):
            if short.window_seconds == long.window_seconds:
                raise ValueError(
                    f"limits name the window {short.window_seconds:g} s twice "
                    f"({short.watts:g} W and {long.watts:g} W): keep one of them"
                )
            if short.watts <= long.watts:
                raise ValueError(
                    f"limits contradict each other: {long.watts:g} W over "
                    f"{long.window_seconds:g} s can never bind, because {short.watts:g} W over "
                    f"{short.window_seconds:g} s is already tighter; lower the longer one "
                    "or remove it"
                )
        return self

    @property
    def asks_for_shaping(self) -> bool:
        """Whether there is anything to keep: then a shaper that can't run stops the start."""
        return bool(self.limits) or self.itl_target_seconds is not None

    @property
    def power_limits(self) -> tuple[PowerLimit, ...]:
        """The limits as the core's values, shortest window first."""
        ordered = sorted(self.limits, key=lambda limit: limit.window_seconds)
        return tuple(limit.as_limit() for limit in ordered)


def _first_line(error: ValidationError) -> str:
    detail = error.errors()[0]
    return str(detail["msg"]).removeprefix("Value error, ")


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


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
        if key not in ShaperConfig.model_fields:
            raise ConfigError(
                f"{source} has an unknown key {key!r}; {_nearest(key, ShaperConfig.model_fields)}"
            )
    try:
        return ShaperConfig(**settings)
    except ValidationError as error:
        details = error.errors()
        unknown = (each for each in details if each["type"] == "extra_forbidden")
        detail = next(unknown, details[0])
        where = ".".join(str(part) for part in detail["loc"])
        message = _first_line(error)
        if detail["type"] == "extra_forbidden":
            message = f"unknown key; {_nearest(str(detail['loc'][-1]), LimitConfig.model_fields)}"
        given = "" if detail["type"] == "value_error" else f" (given: {detail['input']!r})"
        raise ConfigError(f"{source}: {f'{where}: ' if where else ''}{message}{given}") from error


def parse_config_text(text: str, source: str = "--power-shaper-config") -> dict[str, Any]:
    """The settings behind a JSON object, or behind a path to a JSON or TOML file.

    Raises:
        ConfigError: it is neither.
    """
    stripped = text.strip()
    if stripped.startswith("{"):
        return _json_object(stripped, source)
    path = Path(stripped).expanduser()
    try:
        content = path.read_text()
    except OSError as error:
        raise ConfigError(
            f"{source}: {stripped!r} is neither a JSON object nor a readable file "
            f"({error.strerror}); give '{{\"limits\": [...]}}' or a path to .json or .toml"
        ) from error
    if path.suffix.lower() != ".toml":
        return _json_object(content, str(path))
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _json_object(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source} must be a JSON object, not {value!r}")
    return value


def settings_from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that `SHAPER_*` variables give.

    Raises:
        ConfigError: a `SHAPER_` variable that means nothing, with the nearest that does.
    """
    fields = ShaperConfig.model_fields
    variables = {f"{ENV_PREFIX}{name.removesuffix('_seconds').upper()}": name for name in fields}
    settings: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in EMULATION_VARIABLES:
            continue
        if variable == CONFIG_VARIABLE:
            continue
        if variable not in variables:
            raise ConfigError(
                f"environment variable {variable} means nothing to the shaper; "
                f"{_nearest(variable, variables)}"
            )
        settings[variables[variable]] = _environment_value(text)
    if CONFIG_VARIABLE in environ:
        settings |= parse_config_text(environ[CONFIG_VARIABLE], CONFIG_VARIABLE)
    return settings


def _environment_value(text: str) -> Any:
    if text.strip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{text!r} is not valid JSON: {error}") from error
    return text


def load_config(given: Mapping[str, Any] | None, environ: Mapping[str, str]) -> ShaperConfig:
    """The config of this engine: what was given, filled up from the environment.

    Raises:
        ConfigError: with the key, the value and the fix.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"power_shaper must be an object of keys, not {given!r}")
    return build_config(settings_from_environment(environ) | dict(given or {}))


def check_floor(config: ShaperConfig, idle_watts: float) -> None:
    """Refuse a limit that even an idle engine would break.

    Raises:
        ConfigError: naming the limit and the idle power.
    """
    for limit in config.limits:
        if limit.watts <= idle_watts:
            raise ConfigError(
                f"power limit {limit.watts:g} W over {limit.window_seconds:g} s is not above "
                f"what the GPUs of this engine draw idle ({idle_watts:.0f} W): no schedule can "
                f"keep it; give more than {math.ceil(idle_watts)} W"
            )
