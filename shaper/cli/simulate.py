"""`shaper simulate`: runs a rack in virtual time, prints its figures, writes JSON and a report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shaper.cli.simulate_arguments import build_parser, setup_of, workload_of
from shaper.engine.preflight import check_vllm_imports
from shaper.errors import ConfigError
from shaper.files.outputs import check_output, check_package
from shaper.simulate.bar import ProgressBar
from shaper.simulate.checks import check_setup, floor_watts, setup_warnings
from shaper.simulate.figures import rack_figures
from shaper.simulate.search import Factors, Probe, Search, search_limit
from shaper.simulate.setup import RackResult, RackSetup
from shaper.simulate.show import limit_text, rack_dict, rack_text
from shaper.traffic.workload import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Its exit code; 130 when it is interrupted.

    Raises:
        ConfigError: a wrong argument, or a rack that can't be built.
        TraceError: the trace can't be read.
        EngineError: vLLM is not installed.
    """
    arguments = build_parser().parse_args(argv)
    check_output(arguments.json, "--json")
    check_output(arguments.report, "--report", ".html")
    if arguments.report is not None:
        check_package("plotly", "--report")
    setup = setup_of(arguments)
    check_setup(setup)
    for warning in setup_warnings(setup):
        print(f"shaper: warning: {warning}", file=sys.stderr)
    workload = workload_of(arguments)
    # Without it vLLM logs each engine that it configures.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    check_vllm_imports()
    search = None
    try:
        with ProgressBar(sys.stderr, not arguments.quiet) as bar:
            if arguments.search_limit:
                factors = Factors(arguments.ttft_factor, arguments.itl_factor)
                search = _search(setup, workload, factors, arguments.search_window, bar)
                result = search.result
            else:
                result = _run(setup, workload, bar)
    except KeyboardInterrupt:
        print("shaper: interrupted: nothing is written", file=sys.stderr)
        return 130  # as a shell counts a death by SIGINT
    figures = rack_figures(result)
    print(rack_text(result, figures))
    if search is not None:
        print(_found(search))
    if arguments.json is not None:
        found = rack_dict(result, figures)
        if search is not None:
            found["search"] = _search_dict(search)
        _write(arguments.json, json.dumps(found, indent=2) + "\n", "--json")
    if arguments.report is not None:
        from shaper.simulate.report import rack_page

        _write(arguments.report, rack_page(result, figures), "--report")
    return 0


def _run(setup: RackSetup, workload: Workload, bar: ProgressBar) -> RackResult:
    from shaper.simulate.runs import RackProgress, run_rack

    def progress(now: RackProgress) -> None:
        bar.update(now.now_seconds, now.duration_seconds, now.arrived_requests)

    result = run_rack(setup, workload, progress)
    bar.clear()
    return result


def _search(
    setup: RackSetup, workload: Workload, factors: Factors, window_seconds: float, bar: ProgressBar
) -> Search:
    def run(each: RackSetup) -> RackResult:
        limit = f"{limit_text(each.group_limits[0])} " if each.shaped else "unshaped "
        bar.name = limit
        return _run(each, workload, bar)

    def shown(probe: Probe) -> None:
        print(_probe_text(probe), flush=True)

    floor = floor_watts(setup) * setup.engines
    return search_limit(setup, run, floor, factors, window_seconds, shown)


def _probe_text(probe: Probe) -> str:
    verdict = f"not kept: {', '.join(probe.failed)}" if probe.failed else "good"
    return (
        f"{limit_text(probe.limit)} ({probe.peak_ratio:.3f} of the unshaped peak): "
        f"p99 TTFT x {probe.ttft_ratio:.2f}, p99 ITL x {probe.itl_ratio:.2f} "
        f"({1e3 * probe.itl_seconds:.0f} ms), tokens/s x {probe.throughput_ratio:.3f}, highest "
        f"metered window {probe.metered_window_ratio:.4f} of the limit: {verdict}"
    )


def _found(search: Search) -> str:
    before = search.unshaped.group
    unshaped = (
        f"unshaped: peak {before.peak_watts:.0f} W, p99 TTFT {1e3 * before.ttft_seconds.p99:.0f} "
        f"ms, p99 ITL {1e3 * before.itl_seconds.p99:.1f} ms"
    )
    if search.lowest is None:
        return f"{unshaped}\nno limit below the unshaped peak is good; the figures are unshaped"
    ratio = search.lowest.watts / before.peak_watts
    return (
        f"{unshaped}\nlowest good limit: {limit_text(search.lowest)}, {ratio:.3f} of that peak; "
        "the figures are of it"
    )


def _search_dict(search: Search) -> dict[str, Any]:
    return {
        "lowest_limit_watts": None if search.lowest is None else search.lowest.watts,
        "unshaped_peak_watts_100ms": search.unshaped.group.peak_watts,
        "probes": [asdict(probe) for probe in search.probes],
    }


def _write(path: Path, text: str, flag: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error}") from error
