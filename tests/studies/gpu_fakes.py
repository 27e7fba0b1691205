"""Without a server: steps of an emulated GPU in virtual time, and requests that get their
tokens from them. Without vLLM: an engine whose steps an emulated GPU runs on the real clock."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.client import Replay, RequestRecord
from bench.studies.gpu.engine import EngineRunner, EngineSettings, StepLog
from bench.studies.gpu.plan import QUICK, Run
from bench.studies.gpu.store import RECORDING, RunMeta, write_run
from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import GpuSample, PowerLimit, StepBatch
from shaper.emulator.device import EmulatedDevice
from shaper.emulator.shapes import load_model_config, load_shape
from shaper.emulator.silicon import EmulatedGpus
from shaper.emulator.trace import PowerTrace
from shaper.gpu.profiles import load_profile
from shaper.recording.format import RecordedStep, Recording, RecordingWriter
from shaper.simulate.true_gpu import scaled
from shaper.traffic.workload import TimedRequest

GPU, MODEL = "h200-sxm", "llama-3.1-8b"
SOURCE = f"emulated {GPU}"
START_SECONDS = 1.0
SAMPLE_SECONDS = 0.02
META = {
    "gpu": GPU,
    "tensor_parallel": 1,
    "model_config": load_model_config(MODEL),
    "source": SOURCE,
}


TINY = dataclasses.replace(
    QUICK,
    seconds_per_point=0.35,
    idle_seconds=0.1,
    heat_seconds=0.1,
    cadence_seconds=(0.012, 0.025),
    decode_batches=(1, 8),
    chunks_tokens=(128, 512),
    wave_total_seconds=0.1,
)


class BareEngine(EngineRunner):
    """Takes vLLM's place: a batch of fixed shape, two steps in flight, on an emulated GPU."""

    def __init__(self, settings: EngineSettings, reader: Any = None) -> None:
        self._emulated = EmulatedDevice(settings.emulate or GPU, load_shape(settings.model))
        self.reader = reader if reader is not None else self._emulated.reader
        self.kv_tokens = 500_000
        self.about = {"runner": "emulated steps, no engine"}
        self._log = StepLog()
        self._flying: deque[Any] = deque()
        self._decodes = self._context = 0
        self._chunk = self._chunk_context = self._chunks_left = 0

    def start_decodes(self, batch: int, context_tokens: int) -> None:
        self.clear()
        self._decodes, self._context = batch, context_tokens

    def start_chunks(self, context_tokens: int, chunk_tokens: int, count: int) -> None:
        self.clear()
        self._chunk_context, self._chunk, self._chunks_left = context_tokens, chunk_tokens, count

    def step(self) -> bool:
        work = self._next()
        if work is None and not self._flying:
            return False
        if work is not None:
            self._log.launched(time.monotonic(), work)
            self._flying.append(self._emulated.launch(work))
        if work is None or len(self._flying) > 1:
            self._land()
        return True

    def drain(self) -> None:
        while self._flying:
            self._land()

    def clear(self) -> None:
        self.drain()
        self._decodes = self._chunks_left = 0

    def close(self) -> None:
        self._emulated.close()

    def _land(self) -> None:
        self._emulated.wait(self._flying.popleft())
        self._log.returned(time.monotonic())

    def _next(self) -> StepBatch | None:
        if self._decodes:
            self._context += 1
            return StepBatch(
                decode_requests=self._decodes,
                decode_tokens=self._decodes,
                decode_context_tokens=self._decodes * self._context,
            )
        if not self._chunks_left:
            return None
        self._chunks_left -= 1
        ends = self._chunk_context + self._chunk
        return StepBatch(
            prefill_requests=1,
            prefill_tokens=self._chunk,
            prefill_context_tokens=ends,
            prefill_token_context_product=self._chunk * ends,
            prefill_squared_tokens=self._chunk**2,
        )


def batch(decodes: int, prefill_tokens: int) -> StepBatch:
    return StepBatch(
        decode_requests=decodes,
        decode_tokens=decodes,
        decode_context_tokens=decodes * 900,
        prefill_requests=int(prefill_tokens > 0),
        prefill_tokens=prefill_tokens,
        prefill_context_tokens=prefill_tokens,
        prefill_token_context_product=prefill_tokens**2,
        prefill_squared_tokens=prefill_tokens**2,
    )


def emulated_recording(
    seconds: float,
    largest_chunk: int = 4096,
    seed: int = 0,
    joules_ratio: float = 1.0,
    exact_meter: bool = True,
) -> tuple[Recording, PowerTrace]:
    """Steps with and without prompts, and pauses; with the true power.

    `joules_ratio` is what the emulated GPU draws over what the step model says.
    """
    model = StepModel(load_profile(GPU), WorkCoefficients.from_shape(load_shape(MODEL)))
    plant = scaled(model, joules_ratio=joules_ratio)
    gpus = EmulatedGpus(plant.profile, plant, start_seconds=0.0, seed=seed, exact_meter=exact_meter)
    rng = np.random.default_rng(seed)
    steps: list[RecordedStep] = []
    samples: list[GpuSample] = []
    now, tick = START_SECONDS, 0
    while now < START_SECONDS + seconds:
        prefill = int(rng.integers(256, largest_chunk + 1)) if rng.random() < 0.15 else 0
        work = batch(int(rng.integers(8, 64)), prefill)
        run = gpus.launch(work, now)
        steps.append(RecordedStep(run.start_seconds, run.end_seconds, work))
        now = run.end_seconds + (float(rng.uniform(0.0, 0.2)) if rng.random() < 0.02 else 0.0)
        while tick * SAMPLE_SECONDS <= now:
            samples += gpus.sample(tick * SAMPLE_SECONDS)
            tick += 1
    gpus.advance(now)
    return Recording(META, tuple(steps), tuple(samples)), PowerTrace(gpus.take_segments())


def replay_of(recording: Recording, failed: int = 0) -> Replay:
    """Ten requests whose tokens are the steps' ends; the last `failed` of them have an error."""
    ends = [step.end_seconds for step in recording.steps]
    records = []
    for index in range(10):
        times = np.array(ends[index * 3 + 2 :: 10], dtype=np.float64)
        due = times[0] - 0.05
        error = "HTTP 500: out of order" if index >= 10 - failed else None
        request = TimedRequest(due, 512, len(times))
        records.append(RequestRecord(request, due, due, times, len(times), error))
    return Replay(tuple(records), START_SECONDS, ends[-1], 0.1, 0.001)


def write_emulated_run(
    folder: Path, run: Run, limit: PowerLimit | None, seconds: float = 6.0, **arguments: Any
) -> RunMeta:
    """A finished run as a server would have left it; a limit makes its chunks smaller."""
    failed = arguments.pop("failed", 0)
    chunk = 4096 if limit is None else 1024
    recording, _ = emulated_recording(seconds, largest_chunk=chunk, **arguments)
    folder.mkdir(parents=True, exist_ok=True)
    writer = RecordingWriter(folder / RECORDING, recording.meta)
    writer.write(recording.steps, recording.samples)
    writer.close()
    replayed = replay_of(recording, failed)
    meta = RunMeta(
        run=run,
        limit=limit,
        source=SOURCE,
        arguments=("shaper", "serve", MODEL),
        started_seconds=replayed.started_seconds,
        finished_seconds=replayed.finished_seconds,
        start_up_seconds=20.0,
        about={"versions": "none: a fake", "machine": "none", "at": "never"},
    )
    write_run(folder, meta, replayed)
    return meta
