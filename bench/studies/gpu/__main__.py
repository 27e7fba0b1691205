"""One GPU, real or emulated: the power and speed of its steps, then vLLM under real traffic.

    python -m bench.studies.gpu --out out/h200
    shaper fit out/h200/recording.parquet --output h200-mine.toml

On a machine with an NVIDIA GPU, vLLM 0.23 or newer, and no network; docs/gpu-study.md says what
each stage shows. The GPU is read: no clock, limit or mode is touched. A stage takes 4 minutes
at most and leaves its files when it ends; a later call goes on where this one was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness import options as kinds
from bench.harness.options import one_line
from bench.studies.gpu import rest
from bench.studies.gpu.engine import EngineSettings
from bench.studies.gpu.pack import first_seconds, join, pack
from bench.studies.gpu.plan import (
    DEFAULT_STAGES,
    ENGINE_STAGES,
    FIRST_EMULATED_START_SECONDS,
    FIRST_START_SECONDS,
    QUICK,
    RUNS,
    STAGES,
    TOTAL_MINUTES,
    UNSHAPED,
    Budget,
    Plan,
    Run,
    expected_seconds,
)
from bench.studies.gpu.process import EngineJob, run_apart
from bench.studies.gpu.report import as_data, run_figures, write_report
from bench.studies.gpu.serve import serve_run
from bench.studies.gpu.store import (
    DONE,
    RECORDING,
    Settings,
    is_done,
    read_json,
    read_run,
    read_settings,
    write_json,
)
from shaper.cli.arguments import Parser
from shaper.core.types import PowerLimit
from shaper.emulator.shapes import load_model_config
from shaper.errors import ConfigError, ShaperError
from shaper.gpu.profiles import load_profile
from shaper.recording.format import read_recording

PROGRAM = "bench.studies.gpu"
# Of an H200 by the shipped profile in virtual time (docs/gpu-study.md): three quarters of its
# power on average, and 0.70 of its peak can still serve it.
RATE_HERTZ = 8.0
EMULATED_RATE_HERTZ = 3.0
"""Server, client and emulated GPU share this machine's CPUs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0; 1 where a stage failed or was skipped, or a request failed; 2 where nothing could be
        done; 130 after Ctrl-C: what is done stays.
    """
    stopped = "interrupted; the engine is stopped, what was measured stays"
    return one_line(PROGRAM, lambda: Study(_parser().parse_args(argv)).run(), stopped)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    add("--stages", type=_stages, default=DEFAULT_STAGES, metavar="A,B", help=", ".join(STAGES))
    add("--minutes", type=float, default=TOTAL_MINUTES, help="of this call, starts included")
    add("--emulate", metavar="GPU", help="an emulated GPU, like h200-sxm, in place of a real one")
    add("--quick", action="store_true", help="fewer and shorter points, to try it out")
    add("--force", action="store_true", help="start although the GPU is not idle")
    add("--pack", type=Path, metavar="DIR", help="write the small form of the recordings there")
    add("--profile", metavar="NAME|FILE", help="to predict with; by default the recording's own")
    add = parser.add_argument_group("settled by the first call for a folder").add_argument
    add("--model", help="built-in shape or config directory (default: llama-3.1-8b)")
    add("--duration", type=kinds.seconds, metavar="TIME", help="of arrivals (default: 40s)")
    add("--rate", type=kinds.rate, metavar="PER_SECOND", help=f"requests ({RATE_HERTZ:g})")
    add = parser.add_argument_group("vLLM, on a real GPU").add_argument
    add("--attention-backend", default="TRITON_ATTN", metavar="NAME", help="default: TRITON_ATTN")
    add("--enforce-eager", action="store_true", help="no compilation and no CUDA graphs")
    add("--gpu-memory-utilization", type=kinds.ratio, default=0.9, metavar="RATIO")
    return parser


def _stages(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    for name in asked:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is no stage; give {', '.join(STAGES)}")
    return tuple(name for name in STAGES if name in asked)


class Study:
    """One call of the command.

    Raises:
        ConfigError: wrong input, or the folder was started with something else.
        TraceError: the folder's settings can't be read.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._out: Path = options.out.resolve()
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {options.out}: {error.strerror}") from error
        if not 0 < options.minutes <= 60:
            raise ConfigError(f"--minutes {options.minutes:g} is not above 0 and up to 60")
        if options.profile is not None:
            load_profile(options.profile)
        self._settings = self._settled()
        self._plan = QUICK if options.quick else Plan()
        self._begin = time.monotonic()
        self._budget = Budget(self._begin + 60.0 * options.minutes)
        self._trouble: list[str] = []

    def _settled(self) -> Settings:
        """The folder's settings, which a later call can't change: its stages would not compare."""
        options, before = self._options, read_settings(self._out)
        if before is None:
            if options.emulate:
                load_profile(options.emulate)
            model = options.model or "llama-3.1-8b"
            load_model_config(model)
            rate = EMULATED_RATE_HERTZ if options.emulate else RATE_HERTZ
            return Settings(
                emulate=options.emulate,
                model=model,
                duration_seconds=options.duration or (6.0 if options.quick else 40.0),
                rate_hertz=options.rate or rate,
                warm_up_seconds=2.0 if options.quick else 4.0,
            )
        for flag, kept in (
            ("emulate", before.emulate),
            ("model", before.model),
            ("duration", before.duration_seconds),
            ("rate", before.rate_hertz),
        ):
            if getattr(options, flag) not in (None, kept):
                raise ConfigError(
                    f"--{flag} {getattr(options, flag)}: --out {options.out} was started with "
                    f"{kept} ({before.source}); leave it out, or give another folder"
                )
        return before

    def run(self) -> int:
        """All stages that were asked for, then the report."""
        left = [name for name in self._options.stages if not self._done(name)]
        servers = [name for name in left if name in RUNS]
        engine = tuple(name for name in left if name in ENGINE_STAGES)
        if (engine or servers) and self._settings.emulate is None:
            self._look_at_gpu()
        write_json(self._out / "settings.json", dataclasses.asdict(self._settings))
        try:
            if engine:
                self._step_engine(engine)
            for name in servers:
                self._guarded(name, lambda name=name: self._serve(RUNS[name]))  # type: ignore[misc]
        finally:
            self._guarded("report", self._report)
        for line in self._trouble:
            print(f"{PROGRAM}: {line}", file=sys.stderr)
        return 1 if self._trouble else 0

    def _done(self, name: str) -> bool:
        done = is_done(self._out / name)
        if done:
            self._say(f"{name}: done before; remove {self._out / name} to do it again")
        return done

    def _guarded(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except (ShaperError, OSError) as error:
            self._note(f"{name}: {error}")

    def _note(self, text: str) -> None:
        self._trouble.append(text)
        self._say(text)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:4.0f} s] {text}", flush=True)

    def _look_at_gpu(self) -> None:
        """Raises ConfigError where the GPU is not idle."""
        reader = rest.open_gpu()
        try:
            state = rest.look(reader)
        finally:
            reader.close()
        write_json(self._out / "gpu.json", state)
        self._say(f"{state['name']}, driver {state['driver']}: {state['idle_watts']} W at rest")
        objections = "; ".join(state["objections"])
        if objections and not self._options.force:
            raise ConfigError(
                f"{state['name']} is not idle: {objections} (--force starts all the same)"
            )
        if objections:
            self._say(f"not idle, and started all the same: {objections}")

    def _engine_settings(self) -> EngineSettings:
        options, emulated = self._options, self._settings.emulate is not None
        return EngineSettings(
            model=self._settings.model,
            emulate=self._settings.emulate,
            attention_backend=None if emulated else options.attention_backend,
            memory_ratio=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
        )

    def _step_engine(self, stages: tuple[str, ...]) -> None:
        end = self._budget.end_seconds
        job = EngineJob(self._out, stages, self._engine_settings(), self._plan, end)
        if run_apart(job):
            self._note(f"{', '.join(stages)}: the engine's process broke; see above")
            return
        for name in stages:
            if not is_done(self._out / name):
                self._note(f"{name}: not all of it fitted the time; a later call does it again")

    def _serve(self, run: Run) -> None:
        limit = self._limit(run)
        settings, span = self._settings, self._settings.workload.span_seconds
        self._budget.start_stage()
        expected = expected_seconds(self._start_seconds(), settings.warm_up_seconds, span)
        left = self._budget.left_seconds
        if expected > left:
            self._note(
                f"{run.name}: skipped: about {expected:.0f} s don't fit the {left:.0f} s left"
            )
            return
        words = "no limit" if limit is None else f"{limit.watts:.1f} W over 100 ms"
        self._say(f"{run.name}: starting the server ({words})")
        folder = self._out / run.name
        engine = self._engine_settings()
        serve_run(settings, run, limit, engine, folder, self._budget, self._say)
        found = run_figures(folder, self._options.profile)
        latency, power = found.latency, found.power
        self._say(
            f"{run.name}: mean {power.mean_watts:.0f} W, "
            f"highest 100 ms {power.peak_watts:.0f} W (rebuilt), "
            f"p99 ITL {1e3 * latency.itl_seconds.p99:.0f} ms, "
            f"p99 TTFT {1e3 * latency.ttft_seconds.p99:.0f} ms"
        )
        for message, count in latency.errors[:3]:
            self._note(f"{run.name}: {count} requests failed: {message}")

    def _start_seconds(self) -> float:
        """What a server's start took last time; else a guess."""
        known = [n for n in RUNS if is_done(self._out / n)]
        if known:
            return read_run(self._out / known[-1])[0].start_up_seconds
        emulated = self._settings.emulate is not None
        return FIRST_EMULATED_START_SECONDS if emulated else FIRST_START_SECONDS

    def _limit(self, run: Run) -> PowerLimit | None:
        if run.budget_ratio is None:
            return None
        unshaped = self._out / UNSHAPED
        if not is_done(unshaped):
            raise ConfigError("its limit is a share of the unshaped peak: run --stages unshaped")
        return run.limit(run_figures(unshaped, self._options.profile).power.peak_watts)

    def _report(self) -> None:
        names = [name for name in ENGINE_STAGES if (self._out / name / DONE).exists()]
        stages = {name: read_json(self._out / name / DONE) for name in names}
        done = [self._out / name for name in RUNS if is_done(self._out / name)]
        runs = [run_figures(folder, self._options.profile) for folder in done]
        if not stages and not runs:
            return
        settings, state = self._settings, self._out / "gpu.json"
        gpu = read_json(state) if state.exists() and settings.emulate is None else {}
        load = settings.workload
        about = {
            "source": f"a real {gpu['name']}" if gpu else settings.source,
            "load": f"{settings.model}, dummy weights; {load.name}, {len(load.requests)} requests",
            "emulated": settings.emulate is not None,
            "settings": dataclasses.asdict(settings),
            "gpu": gpu,
        }
        write_report(self._out, about, stages, runs)
        recordings = {name: read_recording(self._out / name / RECORDING) for name in stages}
        join(self._out / RECORDING, recordings)
        if self._options.pack is not None:
            started = {name: (each, first_seconds(each)) for name, each in recordings.items()}
            started |= {r.name: (r.recording, r.meta.started_seconds) for r in runs}
            figures = {run.name: as_data(run) for run in runs}
            size = pack(self._options.pack, {**about, "runs": figures}, started)
            self._say(f"packed {len(started)} stages in {size / 1e6:.2f} MB")
        self._say(f"wrote {self._out / 'summary.md'} and report.html")


if __name__ == "__main__":
    sys.exit(main())
