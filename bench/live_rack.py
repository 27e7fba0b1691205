"""Several real servers on one machine under the same traffic, and their power summed.

One stream of requests is dealt to the servers in turn, as a router would. Each server
emulates a GPU of its own and writes its true power by the machine's monotonic clock, so
that the traces can be added up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.harness import machine
from bench.harness.client import ClientOptions, Replay, ReplayProgress, replay_together
from bench.harness.latency import LatencyFigures, latency_figures
from bench.harness.progress import Phase, PhaseProgress
from bench.harness.servers import Server, ServerCommand, clean_environment, free_port, shaper_serve
from shaper.core.types import PowerLimit
from shaper.emulator.trace import PowerTrace, read_power_trace
from shaper.errors import TraceError
from shaper.traffic.figures import GRID_SECONDS, PowerFigures, PowerGrid, power_figures
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import Workload

# Two servers that start side by side take most of two cores.
_START_SECONDS_EACH = 18.0
_STOP_SECONDS = 4.0
_WARM_UP_SECONDS = 3.0
_WARM_UP_REQUESTS = 8
_SETTLE_SECONDS = 1.0
# The trace writer's period and some: the run's last milliseconds must be in the file.
_TRACE_FLUSH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RackSettings:
    """What the servers are run with."""

    workload: Workload
    out: Path
    servers: int = 2
    gpu: str = "h200-sxm"
    model: str = "llama-3.1-8b"
    limit_ratio: float = 0.85
    window_seconds: float = 0.1
    itl_target_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RackRun:
    """All servers under the traffic, and what was seen of them."""

    name: str
    arguments: tuple[str, ...]
    """That shape each server."""
    replays: tuple[Replay, ...]
    latency: LatencyFigures
    """Of all requests, whichever server had them."""
    grids: tuple[PowerGrid, ...]
    total: PowerGrid
    power: PowerFigures
    """Of the sum."""
    machine: machine.MachineUse | None


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


def rack_phases(settings: RackSettings, names: Sequence[str]) -> list[Phase]:
    """What `run_rack` goes through for each of the runs."""
    replaying = settings.workload.span_seconds + _WARM_UP_SECONDS + _SETTLE_SECONDS + 5.0
    return [
        phase
        for name in names
        for phase in (
            Phase(f"starting {settings.servers} servers, {name}", _start_seconds(settings)),
            Phase(f"replaying the traffic, {name}", replaying),
            Phase(f"stopping the servers, {name}", _STOP_SECONDS),
        )
    ]


def _start_seconds(settings: RackSettings) -> float:
    return _START_SECONDS_EACH * settings.servers


def run_rack(
    settings: RackSettings,
    name: str,
    shaping: Sequence[str],
    progress: PhaseProgress,
    limits: tuple[PowerLimit, ...] = (),
) -> RackRun:
    """Start the servers, replay the traffic at all of them, stop them, add up their power.

    Args:
        settings: of the rack.
        name: of the run; names its files.
        shaping: flags of each server.
        progress: told about the three phases of `rack_phases`.
        limits: that the sum is judged by.

    Raises:
        ServerError: one did not start, or ended by itself.
        TraceError: one left no power trace.
    """
    commands = [_command(settings, name, index, shaping) for index in range(settings.servers)]
    for index in range(settings.servers):
        _trace_path(settings, name, index).unlink(missing_ok=True)
    progress.next()
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(command)) for command in commands]
        for server in servers:
            server.wait_until_ready(waiting=lambda waited: progress.update())
        progress.next()
        replays, use = _replay(settings, servers, progress)
        for server in servers:
            server.check_alive()
        time.sleep(_TRACE_FLUSH_SECONDS)
        for index, server in enumerate(servers):
            (settings.out / f"{name}-{index}.metrics").write_text(server.metrics())
        progress.next()
    start = min(each.started_seconds for each in replays)
    end = max(each.finished_seconds for each in replays)
    traces = [_trace(_trace_path(settings, name, i)) for i in range(settings.servers)]
    grids, total = sum_power(traces, start, end)
    return RackRun(
        name=name,
        arguments=tuple(shaping),
        replays=replays,
        latency=latency_figures(together(replays)),
        grids=grids,
        total=total,
        power=power_figures(total, limits),
        machine=use,
    )


def _command(
    settings: RackSettings, name: str, index: int, shaping: Sequence[str]
) -> ServerCommand:
    port = free_port()
    arguments = (
        *(settings.model, "--emulate", settings.gpu, *shaping),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
    )
    prefix = _trace_path(settings, name, index).with_suffix("")
    return ServerCommand(
        f"{name} {index}",
        shaper_serve(arguments),
        clean_environment({"SHAPER_EMULATE_TRACE": str(prefix)}),
        settings.out / f"{name}-{index}.server.log",
        port,
    )


def _trace_path(settings: RackSettings, name: str, index: int) -> Path:
    return settings.out / f"{name}-{index}.power.rank0"


def _trace(path: Path) -> PowerTrace:
    try:
        return read_power_trace(path)
    except OSError as error:
        raise TraceError(f"a server left no power trace at {path}: {error.strerror}") from error


def together(replays: Sequence[Replay]) -> Replay:
    """The replays as one, for figures over all of their requests."""
    return Replay(
        records=tuple(record for each in replays for record in each.records),
        started_seconds=min(each.started_seconds for each in replays),
        finished_seconds=max(each.finished_seconds for each in replays),
        client_cpu_seconds=max(each.client_cpu_seconds for each in replays),
        max_loop_lag_seconds=max(each.max_loop_lag_seconds for each in replays),
    )


def _replay(
    settings: RackSettings, servers: Sequence[Server], progress: PhaseProgress
) -> tuple[tuple[Replay, ...], machine.MachineUse | None]:
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
    before = [machine.probe(server.process_group) for server in servers]
    replays = replay_together(loads, watch)
    after = [machine.probe(server.process_group) for server in servers]
    use = machine.use_between(_all(before), _all(after), together(replays).client_cpu_seconds)
    return tuple(replays), use


def _all(probes: Sequence[machine.MachineProbe | None]) -> machine.MachineProbe | None:
    """One probe with the CPU seconds of every server."""
    known = [probe for probe in probes if probe is not None]
    if len(known) < len(probes):
        return None
    return replace(known[0], server_cpu_seconds=sum(each.server_cpu_seconds for each in known))
