"""Real servers on this machine under the same traffic, and their power.

One server, or several to which one stream of requests is dealt in turn, as a router would.
Each server emulates a GPU of its own and writes its true power by the machine's monotonic
clock, so that the traces can be added up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.harness import machine
from bench.harness.client import ClientOptions, Replay, ReplayProgress, replay_together
from bench.harness.decisions import DecisionLog, read_decision_log
from bench.harness.latency import LatencyFigures, latency_figures
from bench.harness.progress import Phase, PhaseProgress
from bench.harness.servers import (
    Server,
    ServerCommand,
    clean_environment,
    free_port,
    shaper_serve,
)
from shaper.core.types import PowerLimit
from shaper.emulator import selfcheck
from shaper.emulator.selfcheck import SelfCheck
from shaper.emulator.trace import PowerTrace, read_power_trace
from shaper.errors import TraceError
from shaper.traffic.figures import GRID_SECONDS, PowerFigures, PowerGrid, power_figures
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import Workload

UNSHAPED, SHAPED, DIVIDED, SHARED = "unshaped", "shaped", "divided", "shared"
# What the phases take on two cores; servers that start side by side take most of them.
_START_SECONDS, _START_SECONDS_EACH = 25.0, 18.0
_SELF_CHECK_SECONDS = 22.0
_STOP_SECONDS = 4.0
# Warm-up: every code path of the server has run, and its caches hold it.
_WARM_UP_SECONDS = 3.0
_WARM_UP_REQUESTS = 12
_SETTLE_SECONDS = 1.0
# The trace writer's period and some: the run's last milliseconds must be in the file.
_TRACE_FLUSH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """What the servers are run with."""

    workload: Workload
    out: Path
    servers: int = 1
    gpu: str = "h200-sxm"
    model: str = "llama-3.1-8b"
    limit_ratio: float = 0.85
    window_seconds: float = 0.1
    itl_target_seconds: float | None = None
    divided: bool = False
    """Run several servers once more, each with its own equal part of the limit."""
    self_check: bool = True
    """Measure first whether the emulated engine keeps up on this machine."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the runs, in order."""
        if self.servers == 1:
            return UNSHAPED, SHAPED
        return (UNSHAPED, DIVIDED, SHARED) if self.divided else (UNSHAPED, SHARED)

    def path(self, name: str, index: int, ending: str) -> Path:
        """A file that server `index` of a run leaves."""
        stem = name if self.servers == 1 else f"{name}-{index}"
        return self.out / f"{stem}.{ending}"


@dataclass(frozen=True, slots=True)
class LiveRun:
    """All servers under the traffic, and what was seen of them."""

    name: str
    flags: tuple[str, ...]
    """That shape each server."""
    command: tuple[str, ...]
    """Of the first server."""
    replay: Replay
    """Of all requests, whichever server had them."""
    latency: LatencyFigures
    grids: tuple[PowerGrid, ...]
    """Power of each server."""
    total: PowerGrid
    power: PowerFigures
    """Of the sum."""
    decisions: DecisionLog | None
    """Of a single server that is shaped."""
    machine: machine.MachineUse | None
    start_up_seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs, judged by the same limit; the unshaped one first, the one it is for last."""

    settings: LiveSettings
    limit: PowerLimit
    runs: tuple[LiveRun, ...]
    self_check: SelfCheck | None = None


def phases(settings: LiveSettings) -> list[Phase]:
    """What `compare` goes through, with the time that each part takes."""
    count = settings.servers
    servers = "server" if count == 1 else f"{count} servers"
    starting = max(_START_SECONDS, _START_SECONDS_EACH * count)
    replaying = settings.workload.span_seconds + _WARM_UP_SECONDS + _SETTLE_SECONDS + 5.0
    checking = [Phase("measuring the emulated engine", _SELF_CHECK_SECONDS)]
    return checking * settings.self_check + [
        phase
        for name in settings.names
        for phase in (
            Phase(f"starting {servers}, {name}", starting),
            Phase(f"replaying the traffic, {name}", replaying),
            Phase(f"stopping {servers}, {name}", _STOP_SECONDS),
        )
    ]


def compare(settings: LiveSettings, progress: PhaseProgress) -> Comparison:
    """Run the servers once for each name, the unshaped ones first: they set the limit.

    The limit is a share of the highest mean power of a window that they reached together, so
    the comparison asks the same of any GPU and model.

    Args:
        settings: of the comparison.
        progress: is told about the phases of `phases`.

    Raises:
        ServerError: a server did not start or ended by itself.
        TraceError: it left no power trace.
        EngineError: the self-check failed.
    """
    check = None
    if settings.self_check:
        progress.next()
        check = selfcheck.run(settings.gpu, settings.model)
    unshaped = run_servers(settings, UNSHAPED, ("--shaper-off",), progress)
    limit = PowerLimit(
        round(settings.limit_ratio * unshaped.power.peak_watts, 1), settings.window_seconds
    )
    progress.say(
        f"unshaped: highest {settings.window_seconds * 1e3:.0f} ms mean "
        f"{unshaped.power.peak_watts:.1f} W; the limit is {limit.watts:.1f} W"
    )
    others = [
        run_servers(settings, name, shaping(settings, name, limit), progress)
        for name in settings.names[1:]
    ]
    judged = [replace(run, power=power_figures(run.total, (limit,))) for run in (unshaped, *others)]
    return Comparison(settings, limit, tuple(judged), check)


def shaping(settings: LiveSettings, name: str, limit: PowerLimit) -> tuple[str, ...]:
    """The flags of each server: a limit of its own, an equal part of it, or a group's."""
    window = f"{limit.window_seconds * 1e3:g}ms"
    if name == SHARED:
        # Another demo on this machine shares nothing with this one.
        group = f"demo-{os.getpid()}"
        flags: tuple[str, ...] = (
            "--power-group",
            group,
            "--group-limit",
            f"{limit.watts:.1f}W@{window}",
        )
    else:
        flags = ("--power-limit", f"{limit.watts / settings.servers:.1f}W@{window}")
    if settings.itl_target_seconds is None:
        return flags
    return (*flags, "--itl-target", f"{settings.itl_target_seconds * 1e3:g}ms")


def run_servers(
    settings: LiveSettings, name: str, flags: Sequence[str], progress: PhaseProgress
) -> LiveRun:
    """Start the servers, replay the traffic at all of them, stop them, add up their power.

    Args:
        settings: of the comparison.
        name: of the run; names its files.
        flags: that shape each server.
        progress: is told about the run's three phases.

    Raises:
        ServerError: one did not start, or ended by itself.
        TraceError: one left no power trace.
    """
    indices = range(settings.servers)
    commands = [_command(settings, name, index, flags) for index in indices]
    for index in indices:
        for ending in ("power.rank0", "decisions.jsonl"):
            settings.path(name, index, ending).unlink(missing_ok=True)
    progress.next()
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(command)) for command in commands]
        start_up = [
            server.wait_until_ready(waiting=lambda waited: progress.update()) for server in servers
        ]
        progress.next()
        replayed, use = _replay(settings, servers, progress)
        for server in servers:
            server.check_alive()
        time.sleep(_TRACE_FLUSH_SECONDS)
        for index, server in enumerate(servers):
            settings.path(name, index, "metrics").write_text(server.metrics())
        progress.next()
    start, end = replayed.started_seconds, replayed.finished_seconds
    grids, total = sum_power([_trace(settings.path(name, i, "power.rank0")) for i in indices],
                             start, end)  # fmt: skip
    log = read_decision_log(settings.path(name, 0, "decisions.jsonl"))
    return LiveRun(
        name=name,
        flags=tuple(flags),
        command=("shaper", *commands[0].arguments[3:]),
        replay=replayed,
        latency=latency_figures(replayed),
        grids=grids,
        total=total,
        power=power_figures(total),
        decisions=log and log.between(start, end),
        machine=use,
        start_up_seconds=max(start_up),
    )


def deal(workload: Workload, servers: int) -> tuple[Workload, ...]:
    """The requests dealt in turn."""
    return tuple(
        replace(workload, requests=workload.requests[index::servers]) for index in range(servers)
    )


def sum_power(
    traces: Sequence[PowerTrace], from_seconds: float, to_seconds: float
) -> tuple[tuple[PowerGrid, ...], PowerGrid]:
    """The traces on one grid of 1 ms, and their sum.

    Args:
        traces: of the servers, on one clock. Outside of it a trace is 0.
        from_seconds: start of the grid, monotonic.
        to_seconds: its end, cut to whole milliseconds.
    """
    count = max(0, int((to_seconds - from_seconds) / GRID_SECONDS))
    edges = from_seconds + np.arange(count + 1, dtype=np.float64) * GRID_SECONDS
    grids = tuple(
        PowerGrid(
            from_seconds,
            np.diff(trace.joules_until(edges)) / GRID_SECONDS,
            tuple(s for s in trace.stalls if from_seconds <= s.at_seconds <= to_seconds),
        )
        for trace in traces
    )
    stalls = sorted((s for grid in grids for s in grid.stalls), key=lambda s: s.at_seconds)
    watts = np.sum([grid.watts for grid in grids], axis=0)
    return grids, PowerGrid(from_seconds, watts, tuple(stalls))


def _command(settings: LiveSettings, name: str, index: int, flags: Sequence[str]) -> ServerCommand:
    port = free_port()
    arguments = (
        *(settings.model, "--emulate", settings.gpu, *flags),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
    )
    environment = {"SHAPER_EMULATE_TRACE": str(settings.path(name, index, "power"))}
    if settings.servers == 1 and "--shaper-off" not in flags:
        environment["SHAPER_DECISION_LOG"] = str(settings.path(name, index, "decisions.jsonl"))
    return ServerCommand(
        name if settings.servers == 1 else f"{name} {index}",
        shaper_serve(arguments),
        clean_environment(environment),
        settings.path(name, index, "server.log"),
        port,
    )


def _trace(path: Path) -> PowerTrace:
    try:
        return read_power_trace(path)
    except OSError as error:
        raise TraceError(f"a server left no power trace at {path}: {error.strerror}") from error


def _replay(
    settings: LiveSettings, servers: Sequence[Server], progress: PhaseProgress
) -> tuple[Replay, machine.MachineUse | None]:
    options = [ClientOptions(server.command.url, server.served_model()) for server in servers]
    progress.update("warming up")
    # Another seed: no prompt of the warm-up is in the prefix cache for the run.
    warm_up = synthesise(_WARM_UP_SECONDS, 4.0, seed=settings.workload.seed + 1_000_003)
    requests = tuple(
        replace(request, output_tokens=min(request.output_tokens, 32))
        for request in warm_up.requests[:_WARM_UP_REQUESTS]
    )
    replay_together([(replace(warm_up, requests=requests), each) for each in options])
    time.sleep(_SETTLE_SECONDS)

    def watch(state: ReplayProgress) -> None:
        for server in servers:
            server.check_alive()
        progress.update(f"{state.sent}/{state.total} sent, {state.finished} finished")

    loads = list(zip(deal(settings.workload, len(servers)), options, strict=True))
    groups = [server.process_group for server in servers]
    before = machine.probe(*groups)
    replays = replay_together(loads, watch)
    replayed = Replay(
        records=tuple(record for each in replays for record in each.records),
        started_seconds=min(each.started_seconds for each in replays),
        finished_seconds=max(each.finished_seconds for each in replays),
        client_cpu_seconds=max(each.client_cpu_seconds for each in replays),
        max_loop_lag_seconds=max(each.max_loop_lag_seconds for each in replays),
    )
    use = machine.use_between(before, machine.probe(*groups), replayed.client_cpu_seconds)
    return replayed, use
