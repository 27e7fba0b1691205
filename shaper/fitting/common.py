"""What both halves of a fit share: a parameter's outcome, intervals, sampled values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shaper.core.model.profile import GpuProfile
from shaper.core.types import ClockEventReasons, GpuSample
from shaper.errors import ConfigError
from shaper.recording.format import RecordedStep

FloatArray = npt.NDArray[np.float64]

WIDEST_RATIO = 0.15
"""Half width of the 95% interval over the value, above which nothing was learnt."""
RANGE_RATIO = 8.0
"""A fitted value stays within this factor of the profile's."""
AT_BOUND = "the fit runs into its bound: what the recording shows is something else"
_LEAST_SPREAD = 1e-3  # no clock or meter is better than that
_THROTTLES = (
    ClockEventReasons.SW_POWER_CAP
    | ClockEventReasons.HW_SLOWDOWN
    | ClockEventReasons.SW_THERMAL_SLOWDOWN
    | ClockEventReasons.HW_THERMAL_SLOWDOWN
    | ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN
)


@dataclasses.dataclass(frozen=True, slots=True)
class FittedParameter:
    """One parameter: what the profile said, what the recording says, and how sure it is."""

    name: str
    profile_value: float
    value: float
    low: float | None = None
    """Lower end of the 95% interval; None when the profile's value was kept."""
    high: float | None = None
    reason: str = ""
    """Why the profile's value was kept; empty when the parameter was fitted."""

    @property
    def identified(self) -> bool:
        """Whether the recording decided the value."""
        return not self.reason


def replaced(profile: GpuProfile, values: Mapping[str, float]) -> GpuProfile:
    """The profile with `group.key` values replaced.

    Raises:
        ConfigError: a value is impossible beside the others.
    """
    groups: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, key = name.split(".")
        groups.setdefault(group, {})[key] = float(value)
    try:
        changes = {
            group: dataclasses.replace(getattr(profile, group), **keys)
            for group, keys in groups.items()
        }
        return dataclasses.replace(profile, **changes)
    except ValueError as error:
        raise ConfigError(f"the fitted profile makes no sense: {error}") from error


def value_of(profile: GpuProfile, name: str) -> float:
    """The profile's number at `group.key`."""
    group, key = name.split(".")
    return float(getattr(getattr(profile, group), key))


def kept(profile: GpuProfile, name: str, reason: str) -> FittedParameter:
    """A parameter that keeps the profile's value, and why."""
    value = value_of(profile, name)
    return FittedParameter(name, value, value, reason=reason)


def sampled(
    steps: Sequence[RecordedStep], samples: Sequence[GpuSample], field: str, *, smooth: bool = False
) -> list[float | None]:
    """A sampled quantity at each step's middle: the nearest reading or, with `smooth`, on
    the straight line between readings. None without any."""
    known = [(s.read_seconds, getattr(s, field)) for s in samples if getattr(s, field) is not None]
    if not known:
        return [None] * len(steps)
    known.sort()
    times = np.array([at for at, _ in known])
    values = np.array([float(value) for _, value in known])
    middles = np.array([(s.start_seconds + s.end_seconds) / 2.0 for s in steps])
    if smooth:
        return [float(value) for value in np.interp(middles, times, values)]
    right = np.minimum(np.searchsorted(times, middles), len(times) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(middles - times[left] <= times[right] - middles, left, right)
    return [float(value) for value in values[nearest]]


def throttled_seconds(samples: Sequence[GpuSample]) -> FloatArray:
    """Times of the readings at which something held the clocks down, in order."""
    times = [s.read_seconds for s in samples if s.clock_event_reasons & _THROTTLES]
    return np.unique(np.array(times, dtype=np.float64))


def overlaps(times: FloatArray, start_seconds: float, end_seconds: float) -> bool:
    """Whether one of the times lies in the interval, or within 100 ms of it."""
    first = np.searchsorted(times, start_seconds - 0.1)
    return bool(first < len(times) and times[first] <= end_seconds + 0.1)


def half_widths(jacobian: FloatArray, residuals: FloatArray) -> FloatArray:
    """Half widths of 95% intervals from the Jacobian at the optimum."""
    widths = 1.96 * np.sqrt(np.maximum(np.diag(covariance_of(jacobian, residuals)), 0.0))
    flat = np.linalg.norm(jacobian, axis=0) < 1e-9
    result: FloatArray = np.where(flat, np.inf, widths)
    return result


def covariance_of(jacobian: FloatArray, residuals: FloatArray) -> FloatArray:
    """Covariance of the parameters from the Jacobian at the optimum."""
    freedom = max(1, len(residuals) - jacobian.shape[1])
    spread = 1.4826 * float(np.median(np.abs(residuals)))
    variance = max(spread**2, float(np.sum(np.minimum(residuals**2, 9 * spread**2))) / freedom)
    result: FloatArray = max(variance, _LEAST_SPREAD**2) * inverse(jacobian)
    return result


def inverse(jacobian: FloatArray) -> FloatArray:
    """Inverse of the curvature at the optimum."""
    # Directions that the data says nothing of have no curvature: the ridge turns them
    # into intervals that are wide beyond any threshold, not into zeros.
    curvature = jacobian.T @ jacobian
    ridge = 1e-10 * float(np.trace(curvature)) * np.eye(len(curvature))
    result: FloatArray = np.asarray(np.linalg.inv(curvature + ridge), dtype=np.float64)
    return result
