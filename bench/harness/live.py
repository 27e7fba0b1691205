"""One comparison: the same traffic against an unshaped and a shaped server.

The shaped server's limit is a share of the highest 100 ms mean power that the
unshaped run reached, so the comparison asks the same of any GPU and model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from bench.harness import machine
from bench.harness.client import ClientOptions, Replay, ReplayProgress, replay
from bench.harness.decisions import DecisionLog, read_decision_log
from bench.harness.latency import LatencyFigures, latency_figures
from bench.harness.progress import Phase, PhaseProgress
from bench.harness.servers import Server, ServerCommand, clean_environment, free_port, shaper_serve
from shaper.core.types import PowerLimit
from shaper.emulator import selfcheck
from shaper.emulator.selfcheck import SelfCheck
from shaper.emulator.trace import read_power_trace
from shaper.errors import TraceError
from shaper.traffic.figures import PowerFigures, PowerGrid, grid_between, power_figures
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import Workload

START_SECONDS = 25.0
_SELF_CHECK_SECONDS = 22.0
_STOP_SECONDS = 4.0
_REPORT_SECONDS = 4.0
# Warm-up: every code path of the server has run, and its caches hold it.
_WARM_UP_SECONDS = 3.0
_WARM_UP_REQUESTS = 12
_SETTLE_SECONDS = 1.0
# The trace writer's period and some: the run's last milliseconds must be in the file.
_TRACE_FLUSH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What a comparison is run with."""

    workload: Workload
    out: Path
    gpu: str = "h200-sxm"
    model: str = "llama-3.1-8b"
    limit_ratio: float = 0.85
    window_seconds: float = 0.1
    itl_target_seconds: float | None = None
    self_check: bool = True
    """Measure first whether the emulated engine keeps up on this machine."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """One server under the traffic, and everything that was seen of it."""

    name: str
    arguments: tuple[str, ...]
    replay: Replay
    latency: LatencyFigures
    grid: PowerGrid
    power: PowerFigures
    decisions: DecisionLog | None
    machine: machine.MachineUse | None
    start_up_seconds: float
    log_path: Path


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both runs, judged against the same limit."""

    settings: DemoSettings
    limit: PowerLimit
    unshaped: RunResult
    shaped: RunResult
    self_check: SelfCheck | None = None

    @property
    def runs(self) -> tuple[RunResult, RunResult]:
        """Unshaped, shaped."""
        return self.unshaped, self.shaped


def phases(settings: DemoSettings) -> list[Phase]:
    """What `compare` goes through, with the time that each part takes."""
    replaying = settings.workload.span_seconds + _WARM_UP_SECONDS + _SETTLE_SECONDS + 5.0
    checking = [Phase("measuring the emulated engine", _SELF_CHECK_SECONDS)]
    return (
        checking * settings.self_check
        + [
            phase
            for name in ("unshaped", "shaped")
            for phase in (
                Phase(f"starting the {name} server", START_SECONDS),
                Phase(f"replaying the traffic, {name}", replaying),
                Phase(f"stopping the {name} server", _STOP_SECONDS),
            )
        ]
        + [Phase("writing the report", _REPORT_SECONDS)]
    )


def compare(settings: DemoSettings, progress: PhaseProgress) -> Comparison:
    """Run both servers, one after the other.

    Args:
        settings: of the comparison.
        progress: told about the phases of `phases`, but for the last.

    Raises:
        ServerError: a server did not start or ended by itself.
        TraceError: it left no power trace.
        EngineError: the self-check failed.
    """
    check = None
    if settings.self_check:
        progress.next()
        check = selfcheck.run(settings.gpu, settings.model)
    unshaped = run_one(settings, "unshaped", ("--shaper-off",), progress)
    limit = PowerLimit(
        round(settings.limit_ratio * unshaped.power.peak_watts, 1), settings.window_seconds
    )
    progress.say(
        f"unshaped: highest {settings.window_seconds * 1e3:.0f} ms mean "
        f"{unshaped.power.peak_watts:.1f} W; the limit is {limit.watts:.1f} W"
    )
    shaped = run_one(settings, "shaped", limit_arguments(settings, limit), progress)
    judged = tuple(
        replace(run, power=power_figures(run.grid, (limit,))) for run in (unshaped, shaped)
    )
    return Comparison(settings, limit, judged[0], judged[1], check)


def limit_arguments(settings: DemoSettings, limit: PowerLimit) -> tuple[str, ...]:
    """The flags that make `shaper serve` keep the limit."""
    power = ("--power-limit", f"{limit.watts:.1f}W@{limit.window_seconds * 1e3:g}ms")
    if settings.itl_target_seconds is None:
        return power
    return (*power, "--itl-target", f"{settings.itl_target_seconds * 1e3:g}ms")


def run_one(
    settings: DemoSettings, name: str, shaping: tuple[str, ...], progress: PhaseProgress
) -> RunResult:
    """Start a server, replay the traffic, stop it and read what it left.

    Raises:
        ServerError: it did not start, or ended by itself.
        TraceError: it left no power trace.
    """
    trace_prefix = settings.out / f"{name}.power"
    decision_path = settings.out / f"{name}.decisions.jsonl"
    for stale in (trace_prefix.with_name(trace_prefix.name + ".rank0"), decision_path):
        stale.unlink(missing_ok=True)
    port = free_port()
    arguments = (
        *(settings.model, "--emulate", settings.gpu, *shaping),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
    )
    environment = {"SHAPER_EMULATE_TRACE": str(trace_prefix)}
    if "--shaper-off" not in shaping:
        environment["SHAPER_DECISION_LOG"] = str(decision_path)
    command = ServerCommand(
        name,
        shaper_serve(arguments),
        clean_environment(environment),
        settings.out / f"{name}.server.log",
        port,
    )
    progress.next()
    with Server(command) as server:
        start_up = server.wait_until_ready(waiting=lambda waited: progress.update())
        progress.next()
        replayed, use = _replay(settings, server, progress)
        server.check_alive()
        time.sleep(_TRACE_FLUSH_SECONDS)
        progress.next()
    grid = _grid(trace_prefix, replayed)
    log = read_decision_log(decision_path)
    return RunResult(
        name=name,
        arguments=("shaper", "serve", *arguments),
        replay=replayed,
        latency=latency_figures(replayed),
        grid=grid,
        power=power_figures(grid),
        decisions=log and log.between(replayed.started_seconds, replayed.finished_seconds),
        machine=use,
        start_up_seconds=start_up,
        log_path=command.log_path,
    )


def _replay(
    settings: DemoSettings, server: Server, progress: PhaseProgress
) -> tuple[Replay, machine.MachineUse | None]:
    options = ClientOptions(server.command.url, server.served_model())
    progress.update("warming up")
    # Another seed: no prompt of the warm-up is in the prefix cache for the run.
    warm_up = synthesise(_WARM_UP_SECONDS, 4.0, seed=settings.workload.seed + 1_000_003)
    requests = tuple(
        replace(request, output_tokens=min(request.output_tokens, 32))
        for request in warm_up.requests[:_WARM_UP_REQUESTS]
    )
    replay(replace(warm_up, requests=requests), options)
    time.sleep(_SETTLE_SECONDS)

    def watch(state: ReplayProgress) -> None:
        server.check_alive()
        progress.update(f"{state.sent}/{state.total} sent, {state.finished} finished")

    before = machine.probe(server.process_group)
    replayed = replay(settings.workload, options, watch)
    after = machine.probe(server.process_group)
    return replayed, machine.use_between(before, after, replayed.client_cpu_seconds)


def _grid(trace_prefix: Path, replayed: Replay) -> PowerGrid:
    path = trace_prefix.with_name(trace_prefix.name + ".rank0")
    try:
        trace = read_power_trace(path)
    except OSError as error:
        raise TraceError(f"the server left no power trace at {path}: {error.strerror}") from error
    return grid_between(trace, replayed.started_seconds, replayed.finished_seconds)
