"""Maps the power and speed of a GPU under a model's steps. It reads the GPU and sets nothing.

    python -m bench.gpu_characterise --stage all --out out/h100
    shaper fit out/h100/recording.parquet --output h100.toml

On a machine with an NVIDIA GPU, vLLM 0.23 or newer, and no network. docs/characterise.md
says what each stage shows. Stages can be run one by one; none takes over 8 minutes, all
together 12 at most: what no longer fits is skipped, and said so. Ctrl-C keeps what was
measured so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.characterise import output, stages
from bench.characterise.bare import BareRunner, EmulatedSteps
from bench.characterise.options import PROGRAM, build_parser, plan_of
from bench.characterise.plan import STAGES, Budget
from bench.characterise.points import Point, make_point
from bench.characterise.reads import read_costs
from bench.characterise.runner import NoLoad, Runner
from bench.characterise.sampling import MeterThread
from bench.characterise.waves import meter
from bench.harness.options import Termination
from shaper import __version__
from shaper.emulator.shapes import load_model_config, load_shape
from shaper.errors import ConfigError, ShaperError
from shaper.gpu.profiles import load_profile, profile_for_device
from shaper.gpu.reader import GpuReader
from shaper.recording.format import RecordingWriter

# These run no steps, and need no engine on a GPU that is there without one.
_ONLY_READ = frozenset({"idle", "reads"})
# Reads under load are timed beside decode steps of this batch.
_READ_BATCH = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. 0 when done, 2 when it can't run here, 130 when interrupted."""
    try:
        options = build_parser(__doc__ or "").parse_args(argv)
        return _Run(options).run()
    except (ShaperError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


class _Run:
    """One run of the command: makes the load, runs the stages, saves what there is."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._begin = time.monotonic()
        self._budget = Budget(options.total_seconds, options.stage_seconds)
        self._stages = STAGES if options.stage == "all" else (options.stage,)
        self._plan = plan_of(options)
        self._before: list[Point] = []
        self._session: stages.Session | None = None
        # Both are refused here, before an engine is started.
        config = load_model_config(options.model)
        if options.emulate:
            load_profile(options.emulate)
        self._driver: GpuReader | None = None if options.emulate else _driver()
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {options.out}: {error.strerror}") from error
        self._files = output.files_in(options.out, options.stage)
        self._meta: dict[str, Any] = {
            "version": __version__,
            "tensor_parallel": 1,
            "model_config": config,
            "model": options.model,
        }

    def run(self) -> int:
        """Everything, from idle to idle."""
        interrupted = False
        # SIGTERM saves what there is too.
        with Termination():
            try:
                self._measure()
            except KeyboardInterrupt:
                interrupted = True
                _say("interrupted: saving what there is")
            finally:
                self._save(interrupted)
        return 130 if interrupted else 0

    def _measure(self) -> None:
        if self._driver is not None and "idle" in self._stages:
            self._before.append(self._idle_without_engine(self._driver))
        runner = self._runner()
        stages.warm_up(runner)
        about = dict(runner.about)
        _say(f"ready after {time.monotonic() - self._begin:.0f} s: {about.get('runner')}")
        identity = runner.reader.gpus[0]
        profile = profile_for_device(identity.name)
        self._meta |= {
            "device": identity.name,
            "enforced_limit_watts": identity.enforced_limit_watts,
            "about": about,
            "ready_after_seconds": time.monotonic() - self._begin,
        }
        if self._options.emulate or profile is not None:
            self._meta["gpu"] = self._options.emulate or (profile.name if profile else None)
        sampler = MeterThread(runner.reader, self._plan.sample_interval_seconds)
        writer = RecordingWriter(self._files.recording, self._meta)
        self._session = session = stages.Session(
            self._plan, self._budget, runner, sampler, writer, points=self._before, say=_say
        )
        session.driver = self._driver is not None
        sampler.start()
        if self._stages != ("idle",) or self._driver is None:
            stages.idle(session, "before, engine ready" if "idle" in self._stages else "before")
        for stage in self._stages:
            # The first stage's time includes the engine's start.
            if stage != self._stages[0]:
                self._budget.start_stage()
            _STAGES[stage](session)
        if self._stages == STAGES:
            self._budget.start_stage()
            stages.idle(session, "after")

    def _runner(self) -> Runner:
        options = self._options
        if self._driver is not None and set(self._stages) <= _ONLY_READ:
            return NoLoad(self._driver)
        if options.torch_only:
            if options.emulate:
                return BareRunner(EmulatedSteps(options.emulate, options.model))
            from bench.characterise.kernels import TorchSteps

            assert self._driver is not None
            return BareRunner(TorchSteps(load_shape(options.model), self._driver))
        from bench.characterise.engine import EngineRunner, EngineSettings

        _say("starting vLLM; on a GPU it compiles and captures graphs for a minute or two")
        settings = EngineSettings(
            model=options.model,
            emulate=options.emulate,
            attention_backend=options.attention_backend,
            memory_ratio=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            top_p=options.top_p,
            max_model_len=self._plan.longest_tokens,
            max_num_seqs=self._plan.largest_batch,
        )
        return EngineRunner(settings, self._driver)

    def _idle_without_engine(self, reader: GpuReader) -> Point:
        """Not part of the recording: there, no step means a context without work."""
        sampler = MeterThread(reader, self._plan.sample_interval_seconds)
        sampler.start()
        start = time.monotonic()
        try:
            time.sleep(self._plan.idle_seconds)
        finally:
            end = time.monotonic()
            sampler.stop()
        extra = {"when": "before, no engine"}
        return make_point("idle", {}, (start, end), [], sampler.take(), extra)

    def _save(self, interrupted: bool) -> None:
        session = self._session
        if session is not None:
            session.meter.stop()
            session.collect()
            session.writer.close()
            session.runner.close()
        if self._driver is not None:
            self._driver.close()
        points = self._before if session is None else session.points
        if not points and session is None:
            return
        outcome = output.Outcome(
            meta={key: value for key, value in self._meta.items() if key != "model_config"}
            | {"plan": dataclasses.asdict(self._plan)},
            points=points,
            findings={} if session is None else session.findings,
            skipped=() if session is None else session.skipped,
            seconds=time.monotonic() - self._begin,
            interrupted=interrupted,
            read_errors=0 if session is None else session.meter.errors,
        )
        output.write(outcome, self._files)
        _say(f"wrote {self._files.summary}")


def _reads(session: stages.Session) -> None:
    """What the reads cost with nothing running, and in a thread beside decode steps."""
    runner, calls = session.runner, session.plan.read_calls
    runner.clear()
    session.meter.stop()
    session.collect()
    costs = read_costs(runner.reader, calls, driver=session.driver)
    session.findings["reads"] = [dataclasses.asdict(cost) for cost in costs]
    for cost in costs:
        _say(f"reads: {cost.name}: {cost.error or f'{cost.median_seconds * 1e3:.3f} ms'}")
    if runner.kv_tokens and session.has_time("reads", "reads under load", 30.0):
        runner.start_decodes(_READ_BATCH, session.plan.cadence_context_tokens)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(read_costs, runner.reader, calls, driver=session.driver)
            while not found.done() and runner.step():
                pass
        costs = found.result()
        session.findings["reads_under_load"] = [dataclasses.asdict(cost) for cost in costs]
        runner.clear()
    session.meter = MeterThread(runner.reader, session.plan.sample_interval_seconds)
    session.meter.start()


def _nothing(session: stages.Session) -> None:
    """Idle is measured around the other stages."""


_STAGES: dict[str, Callable[[stages.Session], None]] = {
    "idle": _nothing,
    "cadence": stages.cadence,
    "decode": stages.decode,
    "prefill": stages.prefill,
    "meter": meter,
    "reads": _reads,
}


def _driver() -> GpuReader:
    if importlib.util.find_spec("pynvml") is None:
        _borrow_binding()
    from shaper.gpu.nvml import NvmlReader, visible_gpus

    return NvmlReader(visible_gpus(os.environ, 1))


def _borrow_binding() -> None:
    """Takes the copy of NVIDIA's binding that vLLM brings: nothing can be installed offline."""
    from bench.characterise import engine

    engine.set_environment(None)
    try:
        sys.modules["pynvml"] = importlib.import_module("vllm.third_party.pynvml")
    except ImportError as error:
        raise ConfigError(
            "NVIDIA's Python binding is missing: pip install nvidia-ml-py, or give --emulate"
        ) from error


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
