"""The same run in virtual time: vLLM's real scheduler over emulated GPUs of a profile.

It leaves the same files as a run of a server, so that the same code makes the same figures
of both: the steps as they ran, the emulated meter read every 20 ms, and each token's time.
What it does not have is HTTP, the API server and the client: its latencies are the engine's.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bench.gpu_serving.plan import Run
from bench.gpu_serving.serve import SETTLE_SECONDS, versions, warm_up_load
from bench.gpu_serving.store import RECORDING, RunMeta, Settings, write_run
from bench.harness.client import Replay, RequestRecord
from shaper.core.types import GpuSample, PowerLimit, StepBatch
from shaper.emulator.shapes import load_model_config
from shaper.recording.format import RecordedStep, RecordingWriter
from shaper.traffic.workload import Workload, prompt_token_ids

if TYPE_CHECKING:
    from shaper.emulator.silicon import EmulatedGpus, StepRun
    from shaper.simulate.engine import VirtualEngine

_SAMPLE_SECONDS = 0.02
# Before the first request: a context at rest, and the energy counter's first refreshes.
_REST_SECONDS = 1.0
# A live engine keeps as much free by default.
_MARGIN_RATIO = 0.01


class _Noted:
    """Emulated GPUs whose steps are noted."""

    def __init__(self, gpus: EmulatedGpus) -> None:
        self.steps: list[RecordedStep] = []
        self._gpus = gpus

    def launch(self, batch: StepBatch, now_seconds: float) -> StepRun:
        run = self._gpus.launch(batch, now_seconds)
        self.steps.append(RecordedStep(run.start_seconds, run.end_seconds, batch))
        return run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpus, name)


def virtual_run(
    settings: Settings,
    run: Run,
    limit: PowerLimit | None,
    profile: str,
    folder: Path,
    max_model_len: int,
) -> RunMeta:
    """Runs it, and keeps it like a run of a server.

    Raises:
        ConfigError: there is no such profile, or a request does not fit.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from shaper.simulate.build import new_engine
    from shaper.simulate.engine import engine_config, new_request

    wall = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    config = engine_config(
        settings.model,
        profile,
        max_num_batched_tokens=run.max_num_batched_tokens,
        max_num_seqs=run.max_num_seqs,
        max_model_len=max_model_len,
    )
    engine = new_engine(
        config,
        profile,
        None if limit is None else (limit,),
        kv_blocks=None,
        itl_target_seconds=run.itl_target_seconds,
        margin_ratio=_MARGIN_RATIO,
        supervise=limit is not None,
    )
    noted = _Noted(engine.gpus)
    engine.gpus = cast("EmulatedGpus", noted)
    samples: list[GpuSample] = []

    def send(load: Workload, name: str, start_seconds: float) -> None:
        for index, request in enumerate(load.requests):
            _go_on(engine, start_seconds + request.arrival_seconds, samples)
            prompt = prompt_token_ids(request, index, load.seed)
            engine.add(new_request(f"{name}{index}", prompt, request.output_tokens, config))
        while engine.busy:
            engine.step()
            _sample(engine, engine.now_seconds, samples)

    # The shaper of a server has seen the warm-up too.
    send(warm_up_load(settings), "w", _REST_SECONDS)
    start = engine.now_seconds + SETTLE_SECONDS
    send(settings.workload, "r", start)
    replayed = _replay(settings, engine, start)
    writer = RecordingWriter(
        folder / RECORDING,
        {
            "gpu": profile,
            "tensor_parallel": 1,
            "model_config": load_model_config(settings.model),
            "source": "virtual time",
        },
    )
    writer.write(noted.steps, samples)
    writer.close()
    meta = RunMeta(
        run=run,
        limit=limit,
        source=f"virtual time on {profile}",
        arguments=(),
        started_seconds=replayed.started_seconds,
        finished_seconds=replayed.finished_seconds,
        start_up_seconds=0.0,
        about={"wall_seconds": time.monotonic() - wall, "versions": versions()},
    )
    write_run(folder, meta, replayed)
    return meta


def _go_on(engine: VirtualEngine, until_seconds: float, samples: list[GpuSample]) -> None:
    while engine.now_seconds < until_seconds and engine.busy:
        engine.step()
        _sample(engine, engine.now_seconds, samples)
    if engine.now_seconds < until_seconds:
        _sample(engine, until_seconds, samples)
        engine.run_until(until_seconds)


def _sample(engine: VirtualEngine, until_seconds: float, samples: list[GpuSample]) -> None:
    """Reads the meter at each tick that has passed."""
    first = round(samples[-1].read_seconds / _SAMPLE_SECONDS) + 1 if samples else 0
    for tick in itertools.count(first):
        at = tick * _SAMPLE_SECONDS
        if at > until_seconds:
            return
        samples += engine.gpus.sample(at)


def _replay(settings: Settings, engine: VirtualEngine, start_seconds: float) -> Replay:
    records = []
    for index, request in enumerate(settings.workload.requests):
        seen = engine.requests[f"r{index}"]
        due = start_seconds + request.arrival_seconds
        times = np.array(seen.token_seconds, dtype=np.float64)
        error = None if seen.finished_seconds is not None else "not finished"
        plain = replace(request, block_ids=())
        records.append(RequestRecord(plain, due, due, times, len(times), error))
    end = max((r.token_seconds[-1] for r in records if len(r.token_seconds)), default=start_seconds)
    return Replay(tuple(records), start_seconds, float(end), 0.0, 0.0)
