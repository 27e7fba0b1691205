"""Fits the profiles of H100, H200 and B200 to the published measurements.

    python -m bench.studies.calibrate h100-sxm [--leave-out qwen3-8b]

Kernels first (GEMM, decode and prefill attention: H100 and H200), then serving power
and latency with what the kernels gave held fixed (H100 and B200). Prints each parameter
beside what the profile says now; the profile's file is edited by hand. With
`--leave-out` the fit does not see that model, and its errors are printed: what to
expect of a model that is not in the file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.harness.options import one_line
from bench.published.rows import DATA, KERNEL_FILES, KernelTimes, kernel_times, serving_rows
from bench.published.serving_fit import Prior, fit_serving, predict_rows, replaced
from shaper.cli.arguments import Parser
from shaper.core.model.profile import GpuProfile
from shaper.gpu.profiles import load_profile

FloatArray = npt.NDArray[np.float64]
_VALUE_BYTES = 2.0
_HEAD_DIM = 128.0


def gemm_seconds(profile: GpuProfile, columns: FloatArray) -> FloatArray:
    """The step model's GEMM law on arrays; columns are rows, outputs, inputs."""
    rows, outputs, inputs = columns.T
    memory, compute = profile.memory, profile.compute
    moved = _VALUE_BYTES * (outputs * inputs + memory.activation_ratio * rows * (outputs + inputs))
    slow = moved / (memory.bandwidth_bytes_per_second * memory.gemm_ratio)
    busy = 2.0 * rows * outputs * inputs / (compute.flops_per_second * compute.gemm_ratio)
    found: FloatArray = profile.kernel.gemm_seconds + (slow**4 + busy**4) ** 0.25
    return found


def decode_seconds(profile: GpuProfile, columns: FloatArray) -> FloatArray:
    """The decode-attention law; columns are requests, keys of each, heads, KV heads."""
    requests, keys, _, kv_heads = columns.T
    memory, kernel = profile.memory, profile.kernel
    moved = requests * keys * kv_heads * _HEAD_DIM * 2.0 * _VALUE_BYTES
    found: FloatArray = (
        kernel.attention_seconds
        + moved / (memory.bandwidth_bytes_per_second * memory.attention_ratio)
        + requests * kv_heads * kernel.attention_request_seconds
    )
    return found


def prefill_seconds(profile: GpuProfile, columns: FloatArray) -> FloatArray:
    """The prefill-attention law, same columns; each prompt is new."""
    requests, keys, heads, kv_heads = columns.T
    memory, compute = profile.memory, profile.compute
    pairs = requests * (keys * (keys + 1.0) / 2.0 + keys * compute.attention_tile_tokens)
    moved = 2.0 * requests * keys * kv_heads * _HEAD_DIM * 2.0 * _VALUE_BYTES
    found: FloatArray = (
        profile.kernel.attention_seconds
        + 4.0 * _HEAD_DIM * heads * pairs / (compute.flops_per_second * compute.attention_ratio)
        + moved / (memory.bandwidth_bytes_per_second * memory.attention_ratio)
    )
    return found


LAWS = {"gemm": gemm_seconds, "decode": decode_seconds, "prefill": prefill_seconds}
KERNEL_PARAMETERS: dict[str, dict[str, tuple[float, float]]] = {
    "gemm": {
        "kernel.gemm_seconds": (1e-7, 2e-5),
        "memory.gemm_ratio": (0.3, 1.0),
        "compute.gemm_ratio": (0.3, 1.0),
        "memory.activation_ratio": (0.01, 1.0),
    },
    "decode": {
        "kernel.attention_seconds": (1e-6, 3e-5),
        "memory.attention_ratio": (0.3, 1.0),
        "kernel.attention_request_seconds": (1e-10, 1e-7),
    },
    "prefill": {
        "compute.attention_ratio": (0.2, 1.0),
        "compute.attention_tile_tokens": (1.0, 2000.0),
    },
}


def fit_kernels(profile: GpuProfile, kind: str, times: KernelTimes) -> dict[str, float]:
    """Bounded least squares of log errors, soft L1."""
    from scipy.optimize import least_squares

    bounds = KERNEL_PARAMETERS[kind]
    names = list(bounds)
    law = LAWS[kind]
    low, high = (np.log([bounds[name][end] for name in names]) for end in (0, 1))
    start = np.log([getattr(getattr(profile, g), k) for g, k in (n.split(".") for n in names)])

    def residuals(point: FloatArray) -> FloatArray:
        candidate = replaced(profile, dict(zip(names, np.exp(point), strict=True)))
        errors: FloatArray = np.log(law(candidate, times.columns) / times.seconds)
        return errors

    inside = np.clip(start, low + 1e-6, high - 1e-6)
    found = least_squares(residuals, inside, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return dict(zip(names, (float(value) for value in np.exp(found.x)), strict=True))


# value, spread in the logarithm, bounds. Values are what the literature or a die of the
# same kind suggests; where the rows say little, the value stays.
H100_PRIORS = {
    "kernel.layer_seconds": Prior(12e-6, 0.5, 2e-6, 40e-6),
    "kernel.expert_layer_seconds": Prior(30e-6, 1.0, 2e-6, 200e-6),
    "kernel.sampler_seconds_per_logit": Prior(0.25e-9, 1.0, 0.01e-9, 0.6e-9),
    "host.step_seconds": Prior(1e-3, 1.0, 1e-5, 4e-3),
    "host.request_seconds": Prior(4e-6, 1.0, 1e-7, 4e-5),
    "host.prefill_seconds": Prior(0.5e-3, 1.0, 1e-5, 5e-3),
    "memory.expert_ratio": Prior(0.75, 0.1, 0.3, 0.95),
    "compute.expert_ratio": Prior(0.5, 0.4, 0.1, 0.76),
    "compute.expert_tile_tokens": Prior(16.0, 1.0, 1.0, 128.0),
    "link.allreduce_seconds": Prior(10e-6, 0.5, 3e-6, 40e-6),
    "link.allreduce_gpu_seconds": Prior(1.5e-6, 0.7, 1e-7, 1e-5),
    "link.bandwidth_bytes_per_second": Prior(340e9, 0.3, 200e9, 430e9),
    "power.gap_watts": Prior(140.0, 0.1, 115.0, 200.0),
    "power.active_watts": Prior(95.0, 0.4, 20.0, 250.0),
    "power.joules_per_byte": Prior(95e-12, 0.4, 30e-12, 200e-12),
    "power.joules_per_kv_byte": Prior(150e-12, 0.4, 30e-12, 400e-12),
    "power.joules_per_flop": Prior(0.75e-12, 0.06, 0.3e-12, 1.2e-12),
    "power.sampler_watts": Prior(200.0, 0.7, 5.0, 700.0),
}
B200_PRIORS = {
    "memory.gemm_ratio": Prior(0.8, 0.1, 0.5, 0.95),
    "memory.attention_ratio": Prior(0.85, 0.1, 0.5, 0.97),
    "compute.gemm_ratio": Prior(0.72, 0.05, 0.5, 0.8),
    "kernel.layer_seconds": Prior(10e-6, 0.5, 1e-6, 60e-6),
    "kernel.gemm_seconds": Prior(3.4e-6, 0.3, 1e-6, 1e-5),
    "kernel.attention_seconds": Prior(11.5e-6, 0.3, 3e-6, 3e-5),
    "kernel.sampler_seconds_per_logit": Prior(0.25e-9, 0.15, 0.01e-9, 0.9e-9),
    "host.step_seconds": Prior(0.6e-3, 0.7, 1e-5, 4e-3),
    "host.request_seconds": Prior(5e-6, 1.0, 1e-7, 9e-5),
    "host.prefill_seconds": Prior(1e-3, 0.5, 1e-5, 3e-3),
    "link.allreduce_seconds": Prior(13.6e-6, 0.3, 3e-6, 4e-5),
    "link.bandwidth_bytes_per_second": Prior(680e9, 0.2, 400e9, 860e9),
    "power.gap_watts": Prior(230.0, 0.1, 175.0, 400.0),
    "power.active_watts": Prior(150.0, 0.4, 20.0, 400.0),
    "power.joules_per_byte": Prior(75e-12, 0.3, 30e-12, 150e-12),
    "power.joules_per_kv_byte": Prior(115e-12, 0.3, 30e-12, 250e-12),
    "power.joules_per_flop": Prior(0.58e-12, 0.04, 0.2e-12, 0.61e-12),
    "power.sampler_watts": Prior(340.0, 0.7, 5.0, 700.0),
}
PRIORS = {"h100-sxm": H100_PRIORS, "b200-sxm": B200_PRIORS}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the fits of one GPU."""
    return one_line("bench.studies.calibrate", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.studies.calibrate", description=__doc__)
    parser.add_argument("gpu", choices=sorted({*PRIORS, *KERNEL_FILES}))
    parser.add_argument("--leave-out", metavar="MODEL", help="don't show this model to the fit")
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args(argv)
    _run(load_profile(arguments.gpu), arguments.leave_out, arguments.data)
    return 0


def _run(profile: GpuProfile, leave_out: str | None, data: Path) -> None:
    fitted: dict[str, float] = {}
    if profile.name in KERNEL_FILES and leave_out is None:
        for kind in LAWS:
            fitted |= fit_kernels(profile, kind, kernel_times(profile, kind, data))
            profile = replaced(profile, fitted)
    if profile.name in PRIORS:
        rows = [row for row in serving_rows(data)[0] if row.gpu == profile.name]
        seen = [row for row in rows if row.model != leave_out]
        found = fit_serving(seen, profile, PRIORS[profile.name])
        fitted |= found
        after = replaced(profile, found)
        for title, chosen in (("fitted", seen), ("left out", [r for r in rows if r not in seen])):
            if chosen:
                points = predict_rows(chosen, after)
                itl = [
                    p.median_itl_seconds / r.median_itl_seconds
                    for p, r in zip(points, chosen, strict=True)
                ]
                watts = [
                    p.watts_per_gpu / r.watts_per_gpu for p, r in zip(points, chosen, strict=True)
                ]
                print(
                    f"{title}: {len(chosen)} rows, mean absolute error of latency "
                    f"{np.abs(np.array(itl) - 1).mean():.1%}, of power "
                    f"{np.abs(np.array(watts) - 1).mean():.1%}"
                )
    now = load_profile(profile.name)
    for name, value in fitted.items():
        group, key = name.split(".")
        print(f"{name:<36} {value:>12.4g}   profile {getattr(getattr(now, group), key):>12.4g}")


if __name__ == "__main__":
    sys.exit(main())
