"""The process that steps an engine. Its end frees the GPU for the servers of later stages."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from bench.harness.options import Termination
from bench.studies.gpu.engine import EngineRunner, EngineSettings
from bench.studies.gpu.plan import Budget, Plan
from bench.studies.gpu.rest import open_gpu
from bench.studies.gpu.session import MeterThread, Session
from bench.studies.gpu.stages import STAGES, run_steps
from bench.studies.gpu.store import DONE, RECORDING, fresh_folder, write_json
from shaper.emulator.shapes import load_model_config
from shaper.errors import ShaperError
from shaper.gpu.profiles import profile_for_device
from shaper.recording.format import RecordingWriter

# With less left no point fits, and what an earlier call has left of a stage stays.
_LEAST_SECONDS = 1.0
# Of the engine's process, to save and to end after the time is over.
_END_SECONDS = 30.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, slots=True)
class EngineJob:
    """What the engine's process does. `end_seconds` is of the monotonic clock."""

    out: Path
    stages: tuple[str, ...]
    settings: EngineSettings
    plan: Plan
    end_seconds: float


def run_apart(job: EngineJob) -> int:
    """Runs the job in a process of its own; its exit code: 0, or 2 after an error line.

    An interrupt ends that process in order: what it has measured is kept.
    """
    process = multiprocessing.get_context("spawn").Process(target=_in_process, args=(job,))
    process.start()
    try:
        process.join(job.end_seconds + _END_SECONDS - time.monotonic())
    finally:
        if process.is_alive():
            process.terminate()
            process.join(_END_SECONDS)
            process.kill()
            process.join()
    return process.exitcode or 0


def _in_process(job: EngineJob) -> None:
    # Ctrl-C reaches both processes; the parent ends this one, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with Termination():
            run_stages(job)
    except ShaperError as error:
        print(f"bench.studies.gpu: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_stages(job: EngineJob, start: Callable[..., EngineRunner] = EngineRunner) -> None:
    """Starts the engine, then runs one stage after the other, each into its folder.

    Raises:
        EngineError: vLLM is missing, or its engine does not start.
        GpuError: no GPU.
    """
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {text}", flush=True)

    with ExitStack() as opened:
        driver = None if job.settings.emulate else opened.enter_context(closing(open_gpu()))
        say("starting vLLM's engine; on a GPU it compiles and captures graphs first")
        runner = opened.enter_context(closing(start(job.settings, driver)))
        _warm_up(runner)
        say(f"the engine is ready: {runner.about['runner']}")
        device = runner.reader.gpus[0]
        known = profile_for_device(device.name)
        meta = {
            "tensor_parallel": 1,
            "boot": _BOOT.read_text().strip() if _BOOT.exists() else "",
            "model_config": load_model_config(job.settings.model),
            "device": device.name,
            "enforced_limit_watts": device.enforced_limit_watts,
            "gpu": job.settings.emulate or (known.name if known else None),
            "about": {**runner.about, "ready_after_seconds": time.monotonic() - begin},
        }
        budget = Budget(job.end_seconds)
        for name in job.stages:
            budget.start_stage()
            if budget.left_seconds > _LEAST_SECONDS:
                _run_stage(job, name, runner, budget, meta, say)


def _run_stage(
    job: EngineJob,
    name: str,
    runner: EngineRunner,
    budget: Budget,
    meta: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    folder = fresh_folder(job.out / name)
    runner.clear()
    runner.take_steps()
    meter = MeterThread(runner.reader, job.plan.sample_interval_seconds)
    writer = RecordingWriter(folder / RECORDING, meta)
    session = Session(name, job.plan, budget, runner, meter, writer, say)
    meter.start()
    done = False
    try:
        STAGES[name](session)
        done = not session.out_of_time
    finally:
        meter.stop()
        session.collect()
        writer.close()
        write_json(
            folder / DONE,
            {
                "done": done,
                "about": {key: value for key, value in meta.items() if key != "model_config"},
                "read_errors": meter.errors,
                "skipped": session.skipped,
                "findings": session.findings,
                "meter": meter.facts(),
                "points": [dataclasses.asdict(point) for point in session.points],
            },
        )


def _warm_up(runner: EngineRunner) -> None:
    """One load of each kind, not recorded: kernels that are compiled at their first use."""
    runner.start_decodes(2, 64)
    run_steps(runner, 60.0, 8)
    runner.start_chunks(64, 256, 2)
    run_steps(runner, 60.0, 3)
