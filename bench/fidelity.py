"""How far the step model and the emulated GPU are from published measurements.

    python -m bench.fidelity                    prints the report
    python -m bench.fidelity --write            writes docs/fidelity.md
    python -m bench.fidelity --check            fails if docs/fidelity.md is not current
    python -m bench.fidelity --held-out         also fits without each model in turn (a minute)
    python -m bench.fidelity --plots DIR        draws the rows

Needs the published files in ../shared/data (or `--data DIR`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.harness.options import one_line
from bench.published.meter_check import check_meter
from bench.published.plot import plot
from bench.published.rows import (
    DATA,
    KERNEL_FILES,
    ServingRow,
    kernel_times,
    meter_recording,
    serving_rows,
)
from bench.published.serving_fit import Assumptions, fit_serving, predict_rows, replaced
from bench.published.steady_state import ServingPoint
from bench.studies.calibrate import LAWS, PRIORS
from shaper.cli.arguments import Parser
from shaper.core.model.profile import GpuProfile
from shaper.emulator.shapes import load_shape
from shaper.gpu.profiles import load_profile

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "fidelity.md"
HELD_OUT_TITLE = "## Models that the fit has not seen"
TARGETS = {"h100-sxm": (0.06, 0.12), "b200-sxm": (0.08, 0.15)}
KERNEL_TARGET = 0.15


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of rows; signs kept."""

    itl: np.ndarray
    mean_itl: np.ndarray
    watts: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[ServingRow], points: Sequence[ServingPoint]) -> Errors:
        """Predicted over measured, minus one."""
        pairs = list(zip(rows, points, strict=True))
        return cls(
            np.array([p.median_itl_seconds / r.median_itl_seconds - 1 for r, p in pairs]),
            np.array([p.mean_itl_seconds / r.mean_itl_seconds - 1 for r, p in pairs]),
            np.array([p.watts_per_gpu / r.watts_per_gpu - 1 for r, p in pairs]),
        )

    def mean(self) -> tuple[float, float]:
        """Mean absolute (median-latency, power) errors."""
        return float(np.abs(self.itl).mean()), float(np.abs(self.watts).mean())


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The document, and the figures that targets are set for."""

    text: str
    serving: dict[str, tuple[float, float]]
    """(latency, power) mean absolute errors by GPU."""
    kernels: dict[tuple[str, str], float]
    """Median errors by GPU and kind of kernel."""


def report(data: Path = DATA, model_configs: dict[str, str] | None = None) -> Report:
    """Everything but the held-out fits.

    Raises:
        TraceError: the published files are missing or broken.
    """
    rows, left_out = serving_rows(data, model_configs)
    lines = [
        "# Fidelity of the emulated GPU",
        "",
        "What the step model says beside what others measured. This file is written by",
        "`python -m bench.fidelity --write` and checked by `--check`; the published files are read",
        "from `../shared/data`. None of it was measured by this project on a GPU of its own: that",
        "part is open.",
        "",
        "## Serving power and inter-token latency (ITL)",
        "",
        "[ML.ENERGY benchmark v3](https://ml.energy), vLLM in steady state. Errors are mean",
        "absolute percentage errors over the rows; one set of parameters per GPU, none per model.",
        "",
        "| GPU | rows | power | target | median ITL | target | mean ITL | power bias |",
        "|---|---|---|---|---|---|---|---|",
    ]
    serving: dict[str, tuple[float, float]] = {}
    details: list[str] = []
    for gpu in sorted({row.gpu for row in rows}, reverse=True):
        chosen = [row for row in rows if row.gpu == gpu]
        points = predict_rows(chosen, load_profile(gpu))
        errors = Errors.of(chosen, points)
        itl, watts = serving[gpu] = errors.mean()
        power_target, itl_target = TARGETS.get(gpu, (None, None))
        lines.append(
            f"| {gpu} | {len(chosen)} | {watts:.1%} | {_target(power_target)} | {itl:.1%} | "
            f"{_target(itl_target)} | {np.abs(errors.mean_itl).mean():.1%} | "
            f"{errors.watts.mean():+.1%} |"
        )
        details += _details(gpu, chosen, points, errors)
    if left_out:
        lines += ["", f"Left out, for want of a shape or profile: {'; '.join(left_out)}."]
    lines += ["", *_by_model(rows), *_assumptions(rows)]
    kernel_lines, kernels = _kernels(data)
    lines += kernel_lines
    lines += _meter(data)
    lines += ["## All rows", "", *details]
    return Report("\n".join(lines).rstrip() + "\n", serving, kernels)


def _target(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _by_model(rows: Sequence[ServingRow]) -> list[str]:
    lines = [
        "By model (a mixture of experts stands in italics: its routing is taken to be even, which",
        "it is not):",
        "",
        "| GPU | model | task | rows | power | median ITL |",
        "|---|---|---|---|---|---|",
    ]
    for gpu, model, task in sorted({(r.gpu, r.model, r.task) for r in rows}, reverse=True):
        chosen = [r for r in rows if (r.gpu, r.model, r.task) == (gpu, model, task)]
        itl, watts = Errors.of(chosen, predict_rows(chosen, load_profile(gpu))).mean()
        name = f"*{model}*" if load_shape(model).experts else model
        lines.append(f"| {gpu} | {name} | {task} | {len(chosen)} | {watts:.1%} | {itl:.1%} |")
    return [*lines, ""]


def _assumptions(rows: Sequence[ServingRow]) -> list[str]:
    base = Assumptions()
    tasks = dict(base.prompt_tokens)
    variants: list[tuple[str, Assumptions]] = [
        ("as assumed: prompts of 430 tokens, spread 2.0, steps of at most 2,048 tokens", base),
        *(
            (
                f"chat prompts of {prompt:.0f} tokens",
                dataclasses.replace(base, prompt_tokens={**tasks, "lm-arena-chat": prompt}),
            )
            for prompt in (200.0, 300.0, 600.0)
        ),
        *(
            (f"prompt spread {sigma}", dataclasses.replace(base, prompt_sigma=sigma))
            for sigma in (0.5, 1.0, 1.5)
        ),
        ("steps of at most 8,192 tokens", dataclasses.replace(base, step_token_budget=8192)),
        ("half of each prompt in the prefix cache", dataclasses.replace(base, computed_ratio=0.5)),
        ("output lengths spread (CV 0.7)", dataclasses.replace(base, length_spread=0.5)),
    ]
    gpus = sorted({row.gpu for row in rows}, reverse=True)
    head = " | ".join(f"{gpu} power | {gpu} ITL" for gpu in gpus)
    lines = [
        "## What the assumptions are worth",
        "",
        "The file says neither how long prompts are nor how the engine was set up. Each line",
        "changes one assumption and leaves the fitted parameters alone.",
        "",
        f"| assumption | {head} |",
        "|---|" + "---|" * (2 * len(gpus)),
    ]
    for title, assumed in variants:
        cells = []
        for gpu in gpus:
            chosen = [row for row in rows if row.gpu == gpu]
            itl, watts = Errors.of(chosen, predict_rows(chosen, load_profile(gpu), assumed)).mean()
            cells.append(f"{watts:.1%} | {itl:.1%}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Other assumptions: 250-token prompts for gpqa; vLLM's sampler sorts the vocabulary for",
        "top-p (the models' own generation settings ask for it), which costs time per sampled row",
        "and vocabulary entry. The B200 rows of llama-3.1-8b at 128 and 256 requests take 27 and",
        "32 ms at 449 and 540 W where 64 requests take 9 ms at 617 W: the GPU waited for its host,",
        "and no law of the GPU explains them.",
        "",
    ]


def _kernels(data: Path) -> tuple[list[str], dict[tuple[str, str], float]]:
    lines = [
        "## Kernel times",
        "",
        "aiconfigurator's measurements on vLLM 0.24, bfloat16, for the matrices and head counts",
        "of the built-in models at TP 1 to 8 (where a matrix was not measured, the nearest one).",
        "",
        "| GPU | kernel | measurements | median error | target | 90th percentile | bias |",
        "|---|---|---|---|---|---|---|",
    ]
    kernels: dict[tuple[str, str], float] = {}
    for gpu in KERNEL_FILES:
        profile = load_profile(gpu)
        for kind, law in LAWS.items():
            times = kernel_times(profile, kind, data)
            ratio = law(profile, times.columns) / times.seconds - 1.0
            kernels[gpu, kind] = float(np.median(np.abs(ratio)))
            title = {"gemm": "GEMM", "decode": "decode attention", "prefill": "prefill attention"}
            lines.append(
                f"| {gpu} | {title[kind]} | {len(ratio)} | {kernels[gpu, kind]:.1%} | "
                f"{KERNEL_TARGET:.0%} | {np.quantile(np.abs(ratio), 0.9):.1%} | "
                f"{np.median(ratio):+.1%} |"
            )
    return [*lines, ""], kernels


def _meter(data: Path) -> list[str]:
    found = check_meter(meter_recording(data), load_profile("a100-sxm-80gb"))
    reasons = "none" if not found.reasons else str(found.reasons)
    return [
        "## Meter, heat and clocks: a recorded A100",
        "",
        "An A100 (PCIe card) stepped from idle to load and back, by its driver and by an external",
        "meter ([Yang et al., SC 2024](https://arxiv.org/abs/2312.02741)). The external power goes",
        "through the emulated meter; then an emulated GPU runs the same load. No cap acted in the",
        "recording: what is shown of the cap controller is that it stays out of the way.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| this card's meter: gain, offset | {found.gain:.3f}, {found.offset_watts:+.1f} W |",
        f"| error of the emulated reading, median / 95% | {found.median_error_watts:.1f} / "
        f"{found.p95_error_watts:.1f} W |",
        f"| time between refreshes, recorded / profile | {found.refresh_seconds * 1e3:.0f} / "
        f"{load_profile('a100-sxm-80gb').meter.instant_refresh_seconds * 1e3:.0f} ms |",
        f"| load shows up too late by (phase of the refresh chosen best) | "
        f"{found.rise_error_seconds * 1e3:+.0f} ms |",
        f"| closed loop: reading under load | {found.loop_watts_error_ratio:.1%} |",
        f"| closed loop: temperature, RMS / largest | {found.celsius_rms:.1f} / "
        f"{found.celsius_max:.1f} K |",
        f"| closed loop: SM clock, emulated / recorded | {found.clock_hertz / 1e6:.0f} / "
        f"{found.recorded_clock_hertz / 1e6:.0f} MHz |",
        f"| closed loop: clock event reasons under load | {reasons} |",
        "",
    ]


def _details(
    gpu: str, rows: Sequence[ServingRow], points: Sequence[ServingPoint], errors: Errors
) -> list[str]:
    lines = [
        f"### {gpu}",
        "",
        "| model | task | GPUs | TP | requests | ITL ms, measured | predicted | error | "
        "W/GPU, measured | predicted | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for index, (row, point) in enumerate(zip(rows, points, strict=True)):
        lines.append(
            f"| {row.model} | {row.task} | {row.gpu_count} | {row.tensor_parallel} | "
            f"{row.requests:.0f} | {row.median_itl_seconds * 1e3:.1f} | "
            f"{point.median_itl_seconds * 1e3:.1f} | {errors.itl[index]:+.0%} | "
            f"{row.watts_per_gpu:.0f} | {point.watts_per_gpu:.0f} | {errors.watts[index]:+.1%} |"
        )
    return [*lines, ""]


def held_out(data: Path = DATA) -> str:
    """Fits without each model in turn and predicts it.

    Raises:
        TraceError: the published files are missing or broken.
    """
    rows, _ = serving_rows(data)
    lines = [
        HELD_OUT_TITLE,
        "",
        "Each line was predicted by a fit that did not see that model (`python -m bench.fidelity",
        "--write --held-out`; kernel parameters come from the kernel files). This is what to",
        "expect of a model that is not in the file.",
        "",
        "| GPU | model left out | power | median ITL |",
        "|---|---|---|---|",
    ]
    for gpu, priors in PRIORS.items():
        chosen = [row for row in rows if row.gpu == gpu]
        for model in sorted({row.model for row in chosen}):
            seen = [row for row in chosen if row.model != model]
            unseen = [row for row in chosen if row.model == model]
            profile: GpuProfile = replaced(
                load_profile(gpu), fit_serving(seen, load_profile(gpu), priors)
            )
            itl, watts = Errors.of(unseen, predict_rows(unseen, profile)).mean()
            lines.append(f"| {gpu} | {model} | {watts:.1%} | {itl:.1%} |")
    return "\n".join([*lines, ""])


def split_document(text: str) -> tuple[str, str]:
    """(what `--check` compares, the held-out section with its title or nothing)."""
    head, mark, tail = text.partition(HELD_OUT_TITLE)
    return head.rstrip() + "\n", mark + tail


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 when `--check` finds the document out of date."""
    return one_line("bench.fidelity", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m bench.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the published files")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    parser.add_argument(
        "--model-config",
        action="append",
        default=[],
        metavar="ID=DIR",
        help="config directory of a model in the data that has no built-in shape",
    )
    return _run(parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    configs = dict(pair.split("=", 1) for pair in arguments.model_config if "=" in pair)
    text = report(arguments.data, configs).text
    old = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    kept = split_document(old)[1]
    section = held_out(arguments.data) if arguments.held_out else kept
    if arguments.check:
        if split_document(old)[0] != text:
            print("docs/fidelity.md is not current: run python -m bench.fidelity --write")
            return 1
        print("docs/fidelity.md is current")
    elif arguments.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(text + ("\n" + section if section else ""))
        print(f"wrote {DOCUMENT}")
    else:
        print(text + ("\n" + section if arguments.held_out else ""))
    if arguments.plots is not None:
        print(f"wrote {plot(arguments.data, arguments.plots)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
