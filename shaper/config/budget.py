"""A budget as an operator writes it, in a setting, an entry of the schedule or a request.

All three say the same terms (`limits`, `gpu_limits`, `ramp_watts_per_second`) in the
same way and are checked alike. `shaper/core/budget.py` says how they combine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import combinations
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from shaper.core.budget import (
    BURST_SECONDS,
    BudgetTerms,
    cannot_bind,
    highest_watts,
    never_binds,
    redundant_pair,
)
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError
from shaper.units import parse_duration, parse_seconds, parse_watts, parse_watts_per_second

# A step takes about 10 ms, and no breaker averages over more than a minute.
MIN_WINDOW_SECONDS = 0.010
MAX_WINDOW_SECONDS = 60.0
# The largest rack-scale server draws about 15 kW; more than this is a unit mistake.
MAX_WATTS = 200_000.0
# The status block shows them all; operators use a handful.
MAX_LIMITS = 32

# With a unit in a text, or as a number in the unit of the key.
Seconds = Annotated[float, BeforeValidator(parse_seconds, json_schema_input_type=float | str)]
Duration = Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=float | str)]
Watts = Annotated[float, BeforeValidator(parse_watts, json_schema_input_type=float | str)]


class Frozen(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _in_range(limit: PowerLimit) -> PowerLimit:
    watts, window_seconds = limit.watts, limit.window_seconds
    if watts <= 0:
        raise ValueError(f"watts={watts:g} must be above 0")
    if watts > MAX_WATTS:
        raise ValueError(
            f"watts={watts:g} is over {MAX_WATTS:g}: if these are milliwatts, "
            f"write {watts / 1000:g}"
        )
    if window_seconds > MAX_WINDOW_SECONDS:
        raise ValueError(
            f"window_seconds={window_seconds:g} is over {MAX_WINDOW_SECONDS:g}: "
            f"if these are milliseconds, write {window_seconds / 1000:g}"
        )
    if window_seconds < MIN_WINDOW_SECONDS:
        raise ValueError(
            f"window_seconds={window_seconds:g} is below {MIN_WINDOW_SECONDS:g}: "
            "a step of the engine is the smallest thing that can be shaped; "
            "give a window of 10 ms or more"
        )
    return limit


def _limit(value: object, validate: ValidatorFunctionWrapHandler) -> PowerLimit:
    """A limit from `560W@1s`, from an object of numbers or quantities, or as it is."""
    if isinstance(value, str):
        watts, at, window = value.partition("@")
        if not at:
            raise ValueError(
                f"power limit {value!r} has no window: a limit holds over a window, write 560W@1s"
            )
        try:
            return _limit({"watts": watts, "window_seconds": window}, validate)
        except ValueError as error:
            raise ValueError(f"power limit {value!r}: {first_line(error)}") from error
    if isinstance(value, Mapping):
        value = dict(value)
        for key, parse in (("watts", parse_watts), ("window_seconds", parse_seconds)):
            if key in value:
                value[key] = parse(value[key])
    limit: PowerLimit = validate(value)
    return _in_range(limit)


def first_line(error: ValueError) -> str:
    """What the first of its mistakes is."""
    if not isinstance(error, ValidationError):
        return str(error)
    return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


def _split(value: object) -> object:
    return [x for x in value.split(",") if x.strip()] if isinstance(value, str) else value


def _ramp(value: object) -> object:
    value = parse_watts_per_second(value)
    if value in ("none", math.inf):
        return math.inf
    # Below a watt a second an engine would take minutes from idle to its first full step.
    if isinstance(value, int | float) and not 1.0 <= value <= 1e6:
        raise ValueError(f"{value:g} is outside 1 to 1,000,000 watts per second")
    return value


def _moment(value: object) -> object:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError as error:
            raise ValueError(f"{value!r} is no moment; write 2026-11-25T18:00:00Z") from error
    if not isinstance(value, datetime):
        raise ValueError(f"{value!r} is no moment; write 2026-11-25T18:00:00Z")
    if value.tzinfo is None:
        raise ValueError(f"{value.isoformat()} has no zone: add Z, or an offset like +01:00")
    return value


Moment = Annotated[datetime, BeforeValidator(_moment)]
Limit = Annotated[PowerLimit, WrapValidator(_limit)]
Limits = Annotated[
    tuple[Limit, ...],
    BeforeValidator(_split, json_schema_input_type=str | tuple[PowerLimit | str, ...]),
    Field(max_length=MAX_LIMITS),
]
Ramp = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(_ramp, json_schema_input_type=float | str),
    PlainSerializer(
        lambda ramp: "none" if ramp == math.inf else ramp, return_type=float | Literal["none"]
    ),
]
"""Infinity is `none`, as fast as it likes."""
_LIMIT: TypeAdapter[PowerLimit] = TypeAdapter(Limit)


def parse_power_limit(text: str) -> PowerLimit:
    """A limit from `560W@1s`.

    Raises:
        ConfigError: the text is no limit; the message says how to write one.
    """
    try:
        return _LIMIT.validate_python(text)
    except ValidationError as error:
        raise ConfigError(first_line(error)) from error


class TermsConfig(Frozen):
    """What a layer of the budget says; a term that is left out is not said."""

    limits: Limits | None = None
    gpu_limits: Limits | None = None
    ramp_watts_per_second: Ramp | None = None

    @model_validator(mode="after")
    def _can_bind(self) -> Self:
        check_limits("limits", self.limits or ())
        check_limits("gpu_limits", self.gpu_limits or ())
        return self

    def terms(self) -> BudgetTerms:
        """The same as the core's value; all None where nothing is said."""
        return BudgetTerms(self.limits, self.gpu_limits, self.ramp_watts_per_second)


def check_limits(name: str, limits: Sequence[PowerLimit]) -> None:
    """All of them can bind.

    Raises:
        ValueError: naming the two that contradict each other.
    """
    for one, two in combinations(limits, 2):
        if one.window_seconds == two.window_seconds:
            raise ValueError(
                f"{name} name the window {one.window_seconds:g} s twice "
                f"({one.watts:g} W and {two.watts:g} W): keep one of them"
            )
    pair = redundant_pair(limits)
    if pair is not None:
        loose, tight = pair
        raise ValueError(
            f"{name} contradict each other: {loose} can never bind, because "
            f"{tight} is already tighter; lower the first or remove it"
        )


def check_pairs(terms: BudgetTerms, gpu_count: int, where: str) -> None:
    """The engine's limits and those of each GPU can all bind, however its GPUs share the work.

    Raises:
        ConfigError: naming the two that contradict each other.
    """
    for limit in terms.limits or ():
        for gpu_limit in terms.gpu_limits or ():
            together = PowerLimit(gpu_limit.watts * gpu_count, gpu_limit.window_seconds)
            loose = None
            if never_binds(limit, together):
                loose = "the engine's"
            elif never_binds(gpu_limit, limit):
                loose = "each GPU's"
            if loose is not None:
                raise ConfigError(
                    f"{where}: the limit of {limit} for the engine and that of "
                    f"{gpu_limit} for each of its {gpu_count} GPU(s) contradict each "
                    f"other: {loose} can never bind; lower it or remove it"
                )


def check_idle(terms: BudgetTerms, gpu_count: int, idle_watts: float, where: str) -> None:
    """Every limit is above what the engine draws idle.

    Args:
        terms: one layer's.
        gpu_count: of the engine.
        idle_watts: what its GPUs draw together between steps.
        where: whose terms these are, for the message.

    Raises:
        ConfigError: naming the limit and the idle power.
    """
    for limits, count, whose in (
        (terms.limits or (), 1, "the GPUs of this engine draw"),
        (terms.gpu_limits or (), gpu_count, "each GPU draws"),
    ):
        floor_watts = idle_watts / count
        for limit in limits:
            if limit.watts <= floor_watts:
                raise ConfigError(
                    f"{where}: power limit {limit} is not above what {whose} idle "
                    f"({floor_watts:.0f} W): no schedule can keep it; give more than "
                    f"{math.ceil(floor_watts)} W"
                )


def loose_limits(
    terms: BudgetTerms, gpu_count: int, enforced_watts: float, where: str
) -> list[str]:
    """A warning for each limit that can never bind on these GPUs.

    None is refused: the enforced limit can change while the engine runs.

    Args:
        terms: one layer's.
        gpu_count: how many GPUs they are for.
        enforced_watts: the driver's enforced limits of these GPUs, summed.
        where: whose terms these are, for the message.
    """
    together = "the GPU" if gpu_count == 1 else f"all {gpu_count} GPUs"
    found = []
    for limits, watts, whose in (
        (terms.limits or (), enforced_watts, together),
        (terms.gpu_limits or (), enforced_watts / gpu_count, "each GPU"),
    ):
        for limit in cannot_bind(limits, watts):
            most_watts = highest_watts(limit.window_seconds, watts)
            bursts = f", and {most_watts:.0f} W in bursts under {BURST_SECONDS:g} s"
            found.append(
                f"{where}: power limit {limit} can never bind: the enforced limit of "
                f"{whose} is {watts:g} W{bursts if most_watts > watts else ''}; lower the power "
                "limit or remove it"
            )
    return found
