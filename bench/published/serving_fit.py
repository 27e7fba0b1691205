"""Predicts the published serving rows, and fits a profile to them.

Which load a row stands for is an assumption: `Assumptions` has all of them, with
why. docs/fidelity.md says how much each one moves the error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bench.published.rows import ServingRow
from bench.published.steady_state import ServingLoad, ServingPoint, steady_state
from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.emulator.shapes import load_shape

FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Assumptions:
    """What the published files don't say of the load."""

    prompt_tokens: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"lm-arena-chat": 430.0, "gpqa": 250.0}
    )
    """Mean prompt by task: 430 is inferred from where the KV cache limits the batch; a
    GPQA question with its choices is about 250 tokens."""
    prompt_sigma: float = 2.0
    """Log-normal spread: the median chat prompt is then 58 tokens, as in public chat logs,
    where a few long ones make the mean."""
    computed_ratio: float = 1.0
    """No prompt token is found in the prefix cache."""
    step_token_budget: int = 2048
    """`max_num_batched_tokens`. The 90th percentiles of large batches lie where steps of
    2,048 tokens do; with 8,192 they would be far above."""
    length_spread: float = 0.0
    memory_ratio: float = 0.9
    """vLLM's default share of the memory; 3 GB of it are activations and graphs."""


def load_of(row: ServingRow, profile: GpuProfile, assumed: Assumptions) -> ServingLoad:
    """The load on one engine of the row."""
    shape = load_shape(row.model)
    room = assumed.memory_ratio * profile.memory.capacity_bytes - 3e9
    cache = row.gpu_count * room - shape.weight_bytes * (1 if shape.experts else row.engines)
    limit = None
    if not shape.sliding_layers:
        limit = max(1.0, cache / shape.kv_bytes_per_token / row.requests)
    return ServingLoad(
        requests=row.requests / row.engines,
        output_tokens=row.output_tokens,
        prompt_tokens=assumed.prompt_tokens.get(row.task, 430.0),
        prompt_sigma=assumed.prompt_sigma,
        computed_ratio=assumed.computed_ratio,
        length_spread=assumed.length_spread,
        step_token_budget=assumed.step_token_budget,
        context_limit_tokens=limit,
    )


def predict_rows(
    rows: Sequence[ServingRow], profile: GpuProfile, assumed: Assumptions | None = None
) -> list[ServingPoint]:
    """What the profile says of each row."""
    given = Assumptions() if assumed is None else assumed
    return [
        steady_state(StepModel(profile, row.coefficients()), load_of(row, profile, given))
        for row in rows
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of a parameter before the fit: a value, a spread in its logarithm,
    and bounds."""

    value: float
    spread: float
    low: float
    high: float


def replaced(profile: GpuProfile, values: Mapping[str, float]) -> GpuProfile:
    """The profile with `group.key` values replaced.

    Raises:
        ValueError: a value is impossible.
    """
    groups: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, key = name.split(".")
        groups.setdefault(group, {})[key] = float(value)
    changes = {
        group: dataclasses.replace(getattr(profile, group), **keys)
        for group, keys in groups.items()
    }
    return dataclasses.replace(profile, **changes)


def fit_serving(
    rows: Sequence[ServingRow],
    profile: GpuProfile,
    priors: Mapping[str, Prior],
    assumed: Assumptions | None = None,
    *,
    itl_spread: float = 0.08,
    watts_spread: float = 0.04,
) -> dict[str, float]:
    """Fits parameters to the rows: bounded least squares in logarithms, with priors.

    Residuals are median and (at half weight) mean inter-token latency and watts, over the
    spreads, with a soft L1 loss so that a row that was measured under other conditions
    does not bend the rest.
    """
    from scipy.optimize import least_squares

    names = list(priors)
    start = np.log([priors[name].value for name in names])
    bounds = (
        np.log([priors[name].low for name in names]),
        np.log([priors[name].high for name in names]),
    )
    spread = np.array([priors[name].spread for name in names])

    def residuals(point: FloatArray) -> FloatArray:
        candidate = replaced(profile, dict(zip(names, np.exp(point), strict=True)))
        found = predict_rows(rows, candidate, assumed)
        errors = []
        for row, one in zip(rows, found, strict=True):
            weight = 0.7 if load_shape(row.model).experts else 1.0
            errors += [
                weight * math.log(one.median_itl_seconds / row.median_itl_seconds) / itl_spread,
                0.5 * weight * math.log(one.mean_itl_seconds / row.mean_itl_seconds) / itl_spread,
                weight * math.log(one.watts_per_gpu / row.watts_per_gpu) / watts_spread,
            ]
        return np.concatenate([errors, 0.7 * (point - start) / spread])

    found = least_squares(
        residuals,
        start,
        bounds=bounds,
        loss="soft_l1",
        f_scale=1.5,
        diff_step=[1e-2] * len(names),
        max_nfev=25,
    )
    return dict(zip(names, (float(value) for value in np.exp(found.x)), strict=True))
