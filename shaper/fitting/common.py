"""What both halves of a fit share: a parameter's outcome, intervals, sampled values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shaper.core.profile import GpuProfile
from shaper.core.types import GpuSample
from shaper.errors import ConfigError
from shaper.recording import RecordedStep

FloatArray = npt.NDArray[np.float64]

WIDEST_RATIO = 0.15
"""Half width of the 95% interval over the value, above which nothing was learnt."""
RANGE_RATIO = 8.0
"""A fitted value stays within this factor of the profile's."""


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
    group, key = name.split(".")
    return float(getattr(getattr(profile, group), key))


def kept(profile: GpuProfile, name: str, reason: str) -> FittedParameter:
    value = value_of(profile, name)
    return FittedParameter(name, value, value, reason=reason)


def sampled(
    steps: Sequence[RecordedStep], samples: Sequence[GpuSample], field: str
) -> list[float | None]:
    """The sampled value nearest to each step's middle; None without samples."""
    known = [(s.read_seconds, getattr(s, field)) for s in samples if getattr(s, field) is not None]
    if not known:
        return [None] * len(steps)
    known.sort()
    times = np.array([at for at, _ in known])
    middles = np.array([(s.start_seconds + s.end_seconds) / 2.0 for s in steps])
    right = np.clip(np.searchsorted(times, middles), 1, max(1, len(times) - 1))
    left = right - 1
    right = np.minimum(right, len(times) - 1)
    nearest = np.where(middles - times[left] <= times[right] - middles, left, right)
    return [float(known[int(index)][1]) for index in nearest]


def half_widths(jacobian: FloatArray, residuals: FloatArray) -> FloatArray:
    """Half widths of 95% intervals from the Jacobian at the optimum."""
    freedom = max(1, len(residuals) - jacobian.shape[1])
    spread = 1.4826 * float(np.median(np.abs(residuals)))
    variance = max(spread**2, float(np.sum(np.minimum(residuals**2, 9 * spread**2))) / freedom)
    variance = max(variance, 1e-12)
    covariance = variance * np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-12)
    widths = 1.96 * np.sqrt(np.maximum(np.diag(covariance), 0.0))
    flat = np.linalg.norm(jacobian, axis=0) < 1e-9
    result: FloatArray = np.where(flat, np.inf, widths)
    return result
