"""Does the emulated engine keep up? Step rate without modelled delay, timing error with it.

`python -m shaper.emulator.selfcheck` prints both. Each figure is of vLLM's own
EngineCore (scheduler, KV cache manager, executor) in one process, without HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shaper.emulator.activate import EMULATE_VARIABLE, TIME_SCALE_VARIABLE, TRACE_VARIABLE
from shaper.errors import EngineError

PROMPT_TOKENS = 16
_WARM_UP_STEPS = 50


@dataclass(frozen=True, slots=True)
class StepRate:
    """How fast the engine steps when the emulated GPU takes no time."""

    concurrency: int
    steps: int
    seconds: float
    busy_ratio: float
    """Share of the machine's processors in use meanwhile, this engine included."""

    @property
    def steps_per_second(self) -> float:
        """Engine steps a second."""
        return self.steps / self.seconds


@dataclass(frozen=True, slots=True)
class TimingError:
    """How far steps on the real clock are from what the emulated GPU asked for."""

    concurrency: int
    steps: int
    modelled_seconds: float
    measured_seconds: float
    late_p50_seconds: float
    late_p99_seconds: float
    stalls: int
    """Wake-ups more than 2 ms late."""
    busy_ratio: float

    @property
    def step_seconds(self) -> float:
        """Mean modelled step."""
        return self.modelled_seconds / self.steps

    @property
    def error_ratio(self) -> float:
        """(measured - modelled) / modelled over all steps."""
        return self.measured_seconds / self.modelled_seconds - 1.0


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Both figures."""

    step_rate: StepRate
    timing_error: TimingError


def run(gpu: str = "h200-sxm", model: str = "llama-3.1-8b") -> SelfCheck:
    """Measures both in processes of their own: vLLM picks its platform once per process.

    Raises:
        EngineError: a measurement failed; the message has the end of its output.
    """
    rate = _in_subprocess("rate", gpu, model)
    timing = _in_subprocess("timing", gpu, model)
    return SelfCheck(StepRate(**rate), TimingError(**timing))


def measure_step_rate(
    gpu: str = "h200-sxm", model: str = "llama-3.1-8b", concurrency: int = 1, steps: int = 3000
) -> StepRate:
    """Steps a second with no modelled delay. Sets the environment of this process."""
    core = _engine(gpu, model, real_time=False, concurrency=concurrency, steps=steps)
    try:
        _step(core, _WARM_UP_STEPS)
        busy = _BusyClock()
        start = time.monotonic()
        _step(core, steps)
        return StepRate(concurrency, steps, time.monotonic() - start, busy.ratio())
    finally:
        core.shutdown()


def measure_timing_error(
    gpu: str = "h200-sxm", model: str = "llama-3.1-8b", concurrency: int = 1, steps: int = 400
) -> TimingError:
    """Timing of decode steps on the real clock. Sets the environment of this process.

    One stream of an 8B model on an H200 decodes in steps of about 5 ms.
    """
    core = _engine(gpu, model, real_time=True, concurrency=concurrency, steps=steps)
    device = core.model_executor.device
    try:
        ends = _step(core, _WARM_UP_STEPS)
        stalls, busy = device.stalls, _BusyClock()
        ends += _step(core, steps)
        runs = device.take_runs()[: len(ends)]
        measured = list(zip(ends, runs, strict=True))[-steps:]
        late = sorted(max(0.0, end - run.end_seconds) for end, run in measured)
        return TimingError(
            concurrency=concurrency,
            steps=steps,
            modelled_seconds=sum(run.seconds for _, run in measured),
            measured_seconds=ends[-1] - ends[-steps - 1],
            late_p50_seconds=late[len(late) // 2],
            late_p99_seconds=late[int(len(late) * 0.99)],
            stalls=device.stalls - stalls,
            busy_ratio=busy.ratio(),
        )
    finally:
        core.shutdown()


class _BusyClock:
    """Share of all processors in use since it was made (from /proc/stat; 0 where there is none)."""

    def __init__(self) -> None:
        self._idle, self._all = self._ticks()

    def ratio(self) -> float:
        idle, total = self._ticks()
        return 1.0 - (idle - self._idle) / (total - self._all) if total > self._all else 0.0

    @staticmethod
    def _ticks() -> tuple[int, int]:
        try:
            fields = [int(text) for text in Path("/proc/stat").read_text().split()[1:9]]
        except (OSError, ValueError):
            return 0, 0
        return fields[3] + fields[4], sum(fields)


def _engine(gpu: str, model: str, *, real_time: bool, concurrency: int, steps: int) -> Any:
    """vLLM's EngineCore over an emulated GPU, in this process, with endless decodes in it."""
    os.environ[EMULATE_VARIABLE] = gpu
    os.environ[TIME_SCALE_VARIABLE] = "1" if real_time else "0"
    os.environ.pop(TRACE_VARIABLE, None)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    from shaper.emulator.executor import EmulatedExecutor
    from shaper.emulator.models import model_directory

    config = EngineArgs(
        model=str(model_directory(model)),
        distributed_executor_backend=EmulatedExecutor,
        load_format="dummy",
        max_model_len=PROMPT_TOKENS + steps + 1000,
        max_num_batched_tokens=8192,
        max_num_seqs=1024,
        async_scheduling=True,
    ).create_engine_config()
    core = EngineCore(config, EmulatedExecutor, log_stats=False)
    for index in range(concurrency):
        core.add_request(
            Request(
                request_id=f"selfcheck-{index}",
                prompt_token_ids=[index % 128] * PROMPT_TOKENS,
                sampling_params=SamplingParams(max_tokens=steps + 500, ignore_eos=True),
                pooling_params=None,
                block_hasher=core.request_block_hasher,
            )
        )
    return core


def _step(core: Any, steps: int) -> list[float]:
    """Steps the engine until `steps` outputs came back; the times at which they did."""
    ends: list[float] = []
    while len(ends) < steps:
        outputs, executed = core.step_fn()
        core.post_step(executed)
        if outputs:
            ends.append(time.monotonic())
    return ends


def _in_subprocess(what: str, gpu: str, model: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "shaper.emulator.selfcheck",
        "--json",
        what,
        "--gpu",
        gpu,
        "--model",
        model,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"the emulator's self-check failed: {tail}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both figures; with `--json rate` or `--json timing`, one of them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m shaper.emulator.selfcheck")
    parser.add_argument("--gpu", default="h200-sxm")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--json", choices=("rate", "timing"))
    options = parser.parse_args(argv)
    if options.json:
        measure = measure_step_rate if options.json == "rate" else measure_timing_error
        print(json.dumps(asdict(measure(options.gpu, options.model))))
        return 0
    check = run(options.gpu, options.model)
    rate, timing = check.step_rate, check.timing_error
    print(
        f"without delay: {rate.steps_per_second:.0f} steps/s "
        f"({rate.concurrency} stream, machine {rate.busy_ratio:.0%} busy)"
    )
    print(
        f"with delay: {timing.error_ratio:+.2%} at steps of {timing.step_seconds * 1e3:.2f} ms, "
        f"late by {timing.late_p50_seconds * 1e3:.2f} ms (p50), "
        f"{timing.late_p99_seconds * 1e3:.2f} ms (p99), {timing.stalls} stalls over 2 ms "
        f"(machine {timing.busy_ratio:.0%} busy)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
