"""`python -m bench.studies.summarise TRACE`: the numbers behind the synthetic traffic.

Reads a recorded trace and prints the JSON that `shaper.traffic.synthetic` draws from:

- quantiles of the prompt lengths;
- quantiles of the output lengths within bins of the prompt length, which keeps
  the joint distribution (rank correlation alone would not: in the conversation
  trace prompts of 1,021 to 1,130 tokens have long outputs, both sides of them short ones);
- the variability of the arrival rate by time scale. A Poisson process whose
  rate fluctuates with variance `v_k` (relative to its mean, squared) and
  correlation time `tau_k` has, over windows of `w` seconds,

      (index of dispersion - 1) / mean count = sum_k v_k * g(w / tau_k),
      g(x) = 2 * (x - 1 + exp(-x)) / x**2,

  so the `v_k` follow from the dispersion at several windows by non-negative least squares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from shaper.cli.arguments import Parser
from shaper.errors import ShaperError, TraceError
from shaper.traffic.traces import TRACE_FORMATS, load_trace
from shaper.traffic.workload import Workload

FloatArray = NDArray[np.float64]

PROMPT_LEVELS = (
    *(0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.19, 0.22, 0.25, 0.28, 0.32),
    *(0.36, 0.4, 0.44, 0.47, 0.5, 0.55, 0.6, 0.65, 0.7, 0.74, 0.77, 0.79, 0.81, 0.83, 0.86, 0.88),
    *(0.9, 0.92, 0.94, 0.95, 0.96, 0.98, 0.99, 0.995, 0.999, 1.0),
)
OUTPUT_LEVELS = (
    *(0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *(0.95, 0.98, 0.995, 1.0),
)
PROMPT_BIN_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
RATE_SECONDS = (0.2, 1.0, 5.0, 25.0, 125.0, 625.0)
WINDOW_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)

# Two of the longest windows, for a variance of their counts.
LEAST_SECONDS = 3.0 * max(WINDOW_SECONDS)
LEAST_REQUESTS = 100


def rate_variance(arrivals: FloatArray, window_seconds: float) -> float:
    """`(index of dispersion - 1) / mean count` of arrivals counted in windows.

    Args:
        arrivals: [requests] seconds, ascending.
        window_seconds: length of a window; the last, cut one is left out.
    """
    edges = np.arange(arrivals[0], arrivals[-1], window_seconds)
    counts = np.histogram(arrivals, edges)[0]
    return float((counts.var(ddof=1) / counts.mean() - 1.0) / counts.mean())


def correlation_share(windows: FloatArray, correlation_seconds: FloatArray) -> FloatArray:
    """`g(w / tau)`: the part of a fluctuation that a window of `w` seconds still sees.

    Args:
        windows: [w] seconds.
        correlation_seconds: [k] seconds.

    Returns:
        [w, k], 1 for windows much shorter than the correlation time.
    """
    x = windows[:, None] / correlation_seconds[None, :]
    return np.asarray(2.0 * (x - 1.0 + np.exp(-x)) / x**2, dtype=np.float64)


def summarise(workload: Workload) -> dict[str, Any]:
    """The summary of a recorded workload, ready for JSON.

    Raises:
        TraceError: it is too short for its slowest fluctuation to show.
    """
    if workload.span_seconds < LEAST_SECONDS or len(workload.requests) < LEAST_REQUESTS:
        raise TraceError(
            f"{workload.name} has {len(workload.requests)} requests in "
            f"{workload.span_seconds:.0f} s; its statistics need {LEAST_REQUESTS} in "
            f"{LEAST_SECONDS:.0f} s or more"
        )
    arrivals = np.array([r.arrival_seconds for r in workload.requests])
    prompts = np.array([r.prompt_tokens for r in workload.requests])
    outputs = np.array([r.output_tokens for r in workload.requests])
    # Observed lengths below the longest: no bin is empty.
    levels = np.quantile(prompts, PROMPT_BIN_LEVELS, method="nearest")
    edges = sorted({int(edge) for edge in levels if edge < prompts.max()})
    bins = np.searchsorted(edges, prompts, side="left")
    shares = correlation_share(np.array(WINDOW_SECONDS), np.array(RATE_SECONDS))
    excess = np.array([rate_variance(arrivals, window) for window in WINDOW_SECONDS])
    # Relative errors: every time scale counts the same.
    weights = 1.0 / np.maximum(np.abs(excess), 1e-9)
    variances, _ = nnls(shares * weights[:, None], excess * weights)
    return {
        "requests": len(prompts),
        "rate_hertz": round((len(arrivals) - 1) / float(arrivals[-1] - arrivals[0]), 4),
        "prompt_levels": PROMPT_LEVELS,
        "prompt_tokens": [int(v) for v in np.quantile(prompts, PROMPT_LEVELS, method="nearest")],
        "output_levels": OUTPUT_LEVELS,
        "output_prompt_edges": edges,
        "output_tokens": [
            [int(v) for v in np.quantile(outputs[bins == b], OUTPUT_LEVELS, method="nearest")]
            for b in range(len(edges) + 1)
        ],
        "rate_correlation_seconds": RATE_SECONDS,
        "rate_relative_variances": [round(float(v), 5) for v in variances],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of a trace. Returns the exit code."""
    parser = Parser(
        prog="python -m bench.studies.summarise", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--format", choices=TRACE_FORMATS, default="auto", help="of the trace")
    try:
        options = parser.parse_args(argv)
        summary = summarise(load_trace(options.trace, options.format))
    except ShaperError as error:
        print(f"bench.studies.summarise: error: {error}", file=sys.stderr)
        return 2
    print(as_json({"source": f"quantiles and rate statistics of {options.trace.name}"} | summary))
    return 0


def as_json(summary: dict[str, Any]) -> str:
    """The summary with one key a line, which keeps its diffs readable."""
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in summary.items())
    return f"{{\n{rows}\n}}"


if __name__ == "__main__":
    sys.exit(main())
