"""vLLM under real traffic on a GPU: unshaped, with static knobs, and shaped at two budgets.

    python -m bench.gpu_serve --out out/gpu --attention-backend TRITON_ATTN
    python -m bench.gpu_serve --out out/gpu --stage virtual report
    python -m bench.gpu_serve --out out/gpu --pack out/gpu-small

Each run is a server of its own (`shaper serve`, dummy weights, no network) under the same
traffic; then the same runs in virtual time, side by side, and a report. docs/gpu-serve.md
says what is saved and compared. The GPU is read; no clock, limit or mode is touched. A stage
that breaks costs only itself, and `all` goes on where an earlier call has stopped.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.characterise.plan import Budget
from bench.gpu_serving import idle, plan
from bench.gpu_serving.figures import RunFigures, as_data, run_figures
from bench.gpu_serving.options import (
    PROGRAM,
    REPORT,
    VIRTUAL,
    build_parser,
    settings_of,
    stage_names,
)
from bench.gpu_serving.pack import pack
from bench.gpu_serving.plan import UNSHAPED, Run
from bench.gpu_serving.serve import EngineOptions, serve_run
from bench.gpu_serving.store import (
    is_done,
    read_json,
    read_meta,
    write_json,
    write_settings,
)
from bench.harness.options import Termination
from bench.harness.tables import without_nan
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError, ShaperError
from shaper.files.outputs import check_package
from shaper.gpu.profiles import load_profile, profile_for_device


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0; 1 where a stage failed, was skipped, or had a request that failed; 2 where nothing
        could be done; 130 after Ctrl-C: what is done stays.
    """
    try:
        with Termination():
            comparison = _Comparison(build_parser(__doc__ or "").parse_args(argv))
            return comparison.run()
    except (ShaperError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the server is stopped, finished runs stay", file=sys.stderr)
        return 130


class _Comparison:
    """One call of the command."""

    def __init__(self, options: Any) -> None:
        _check_packages()
        self._options = options
        self._out: Path = options.out.resolve()
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {options.out}: {error.strerror}") from error
        if options.profile is not None:
            load_profile(options.profile)
        self._settings, self._new = settings_of(options, self._out)
        self._stages = stage_names(options, self._settings)
        self._budget = Budget(options.total_seconds, options.stage_seconds)
        self._begin = time.monotonic()
        self._trouble: list[str] = []

    def run(self) -> int:
        """All stages that were asked for, then the pack."""
        names = {run.name for run in self._settings.runs}
        if names & set(self._stages) and self._settings.emulate is None:
            self._look_at_gpu()
        if self._new:
            write_settings(self._out, self._settings)
        for name in self._stages:
            self._budget.start_stage()
            if name == VIRTUAL:
                self._guarded(name, self._virtual)
            elif name == REPORT:
                self._guarded(name, self._report)
            elif self._asked_by_name(name) or not is_done(self._out / name):
                self._guarded(name, partial(self._serve, self._settings.run(name)))
            else:
                self._say(f"{name}: done before")
        if self._options.pack is not None:
            self._guarded("pack", self._pack)
        for line in self._trouble:
            print(f"{PROGRAM}: {line}", file=sys.stderr)
        return 1 if self._trouble else 0

    def _asked_by_name(self, name: str) -> bool:
        return name in (self._options.stage or [])

    def _guarded(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except (ShaperError, OSError, ImportError) as error:
            self._note(f"{name}: {error}")

    def _note(self, text: str) -> None:
        self._trouble.append(text)
        self._say(text)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:4.0f} s] {text}", flush=True)

    def _look_at_gpu(self) -> None:
        """Raises ConfigError where the GPU is not idle."""
        reader = idle.open_gpu()
        try:
            state = idle.look(reader)
        finally:
            reader.close()
        write_json(self._out / "gpu.json", dataclasses.asdict(state))
        self._say(f"{state.name}, driver {state.driver}: {state.idle_watts} W at rest")
        if state.objections and not self._options.force:
            raise ConfigError(
                f"{state.name} is not idle: {'; '.join(state.objections)} "
                "(--force starts all the same)"
            )
        if state.objections:
            self._say(f"not idle, and started all the same: {'; '.join(state.objections)}")
        if profile_for_device(state.name) is None:
            raise ConfigError(f"no profile describes {state.name}; the shaper would not start")

    def _serve(self, run: Run) -> None:
        limit = self._limit(run, self._out)
        settings = self._settings
        expected = plan.expected_seconds(
            self._start_seconds(), settings.warm_up_seconds, settings.workload.span_seconds
        )
        left = self._budget.left_seconds
        if expected > left:
            self._note(
                f"{run.name}: skipped: about {expected:.0f} s don't fit the {left:.0f} s left"
            )
            return
        words = "no limit" if limit is None else f"{limit.watts:.1f} W over 100 ms"
        self._say(f"{run.name}: starting the server ({words})")
        options = self._options
        engine = EngineOptions(
            options.attention_backend,
            options.enforce_eager,
            options.gpu_memory_utilization,
            options.max_model_len,
        )
        folder = self._out / run.name
        serve_run(
            settings, run, limit, engine, folder, lambda: self._budget.left_seconds, self._say
        )
        self._tell(run_figures(folder, self._options.profile))

    def _start_seconds(self) -> float:
        """What a server's start took last time; else a guess."""
        known = [
            read_meta(self._out / run.name).start_up_seconds
            for run in self._settings.runs
            if is_done(self._out / run.name)
        ]
        if known:
            return known[-1]
        emulated = self._settings.emulate is not None
        return plan.FIRST_EMULATED_START_SECONDS if emulated else plan.FIRST_START_SECONDS

    def _limit(self, run: Run, folder: Path) -> PowerLimit | None:
        """A share of the unshaped peak that `folder` holds."""
        if not run.shaped:
            return None
        unshaped = folder / UNSHAPED
        if not is_done(unshaped):
            raise ConfigError("its limit is a share of the unshaped peak: run --stage unshaped")
        return run.limit(run_figures(unshaped, self._options.profile).power.peak_watts)

    def _tell(self, found: RunFigures, where: str = "") -> None:
        latency, power = found.latency, found.power
        self._say(
            f"{where}{found.name}: mean {power.mean_watts:.0f} W, "
            f"highest 100 ms {power.peak_watts:.0f} W (rebuilt), "
            f"p99 ITL {1e3 * latency.itl_seconds.p99:.0f} ms, "
            f"p99 TTFT {1e3 * latency.ttft_seconds.p99:.0f} ms"
        )
        for message, count in latency.errors[:3]:
            self._note(f"{found.name}: {count} requests failed: {message}")

    def _done(self) -> list[Path]:
        runs = [self._out / run.name for run in self._settings.runs]
        return [folder for folder in runs if is_done(folder)]

    def _profile(self) -> str:
        """The profile to predict with, by name or path."""
        if self._options.profile is not None:
            return str(self._options.profile)
        if self._settings.emulate is not None:
            return self._settings.emulate
        state = self._out / "gpu.json"
        found = profile_for_device(str(read_json(state)["name"])) if state.exists() else None
        if found is None:
            raise ConfigError("no profile is known for the GPU of this folder: give --profile")
        return found.name

    def _virtual_folder(self) -> Path:
        return self._out / f"virtual-{load_profile(self._profile()).name}"

    def _virtual(self) -> None:
        from bench.gpu_serving.virtual import virtual_run

        # Before any server: all of them, to see what a rate asks of a GPU.
        names = {folder.name for folder in self._done()} or {r.name for r in self._settings.runs}
        names.add(UNSHAPED)
        profile, folder = self._profile(), self._virtual_folder()
        for run in (run for run in self._settings.runs if run.name in names):
            # Its own peak: both sides keep the same share of what they would draw unshaped.
            limit = self._limit(run, folder)
            length = self._options.max_model_len
            virtual_run(self._settings, run, limit, profile, folder / run.name, length)
            self._tell(run_figures(folder / run.name), "in virtual time, ")

    def _report(self) -> None:
        from bench.gpu_serving.page import Found, markdown, page

        runs = tuple(run_figures(folder, self._options.profile) for folder in self._done())
        if not runs:
            raise ConfigError("no run is done; run --stage serve first")
        virtual = self._virtual_folder()
        pairs = tuple(
            (run, run_figures(virtual / run.name)) for run in runs if is_done(virtual / run.name)
        )
        gpu = self._out / "gpu.json"
        load = self._settings.workload
        found = Found(
            source=self._source(),
            traffic=f"{load.name}, seed {load.seed}, {len(load.requests)} requests, "
            f"{self._settings.model}, dummy weights",
            gpu=read_json(gpu) if gpu.exists() else {},
            profile=load_profile(self._profile()).name,
            runs=runs,
            pairs=pairs,
        )
        (self._out / "table.md").write_text(markdown(found))
        figures = {run.name: as_data(run) for run in runs}
        in_virtual = {run.name: as_data(run) for _, run in pairs}
        write_json(
            self._out / "figures.json",
            without_nan({"source": found.source, "runs": figures, "virtual": in_virtual}),
        )
        (self._out / "report.html").write_text(page(found), encoding="utf-8")
        self._say(f"report: {self._out / 'report.html'}")

    def _source(self) -> str:
        gpu = self._out / "gpu.json"
        if self._settings.emulate is None and gpu.exists():
            return f"a real {read_json(gpu)['name']}"
        return self._settings.source

    def _pack(self) -> None:
        gpu = self._out / "gpu.json"
        load = self._settings.workload
        about = {
            "source": self._source(),
            "emulated": self._settings.emulate is not None,
            "model": self._settings.model,
            "traffic": load.name,
            "seed": load.seed,
            "gpu": read_json(gpu) if gpu.exists() else None,
        }
        runs = [run_figures(folder, self._options.profile) for folder in self._done()]
        size = pack(self._options.pack, about, runs)
        self._say(f"packed {len(runs)} runs into {self._options.pack}: {size / 1e6:.2f} MB")


def _check_packages() -> None:
    check_package("pyarrow", "bench.gpu_serve")


if __name__ == "__main__":
    sys.exit(main())
