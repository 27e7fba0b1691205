"""The emulated GPUs of one engine on the real clock: launch, wait, meter, trace.

One lock guards the GPUs: the engine's thread launches steps, the sampler's
thread reads the meter, and a thread of this module moves time on while the
engine is idle and writes the true power trace at least once a second.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import StepBatch
from shaper.emulator.host import ProcessorWait, sleep_until
from shaper.emulator.meter import EmulatedReader
from shaper.emulator.playback import PlaybackReader
from shaper.emulator.silicon import EmulatedGpus, StepRun
from shaper.emulator.trace import PowerTraceWriter
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.gpu.reader import GpuReader

STALL_SECONDS = 0.002
"""A longer delay that the host itself adds to the engine is noted in the trace."""

_FLUSH_INTERVAL_SECONDS = 0.1
_KEPT_RUNS = 4096


def trace_path(prefix: str, rank: int) -> Path:
    """The power trace of one data-parallel rank: `PREFIX.rank0`, `PREFIX.rank1`, ..."""
    return Path(f"{prefix}.rank{rank}")


class EmulatedDevice:
    """The GPUs of one engine.

    Args:
        gpu: name of a profile, or path to one.
        shape: the model that they serve.
        tensor_parallel: GPUs of the engine.
        rank: data-parallel rank; names the trace file and seeds the meter.
        trace_prefix: where the true power goes, see `trace_path`. None: nowhere.
        replay: recording whose readings the meter says instead of what the steps draw; of
            all ranks' GPUs, in their order. None: it meters.
        real_time: False lets every step end at once; the meter then runs ahead
            of the clock and means nothing.

    Raises:
        UnknownGpuError: there is no such profile.
        ConfigError: the model can't be split over that many GPUs.
        TraceError: the recording can't be played.
    """

    def __init__(
        self,
        gpu: str,
        shape: ModelShape,
        *,
        tensor_parallel: int = 1,
        rank: int = 0,
        trace_prefix: str | None = None,
        replay: Path | None = None,
        real_time: bool = True,
    ) -> None:
        self.profile: GpuProfile = load_profile(gpu)
        try:
            coefficients = WorkCoefficients.from_shape(shape, tensor_parallel)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.model = StepModel(self.profile, coefficients, tensor_parallel)
        self.stalls = 0
        """Times that the host held the engine's thread up for more than `STALL_SECONDS`."""
        self._real_time = real_time
        self._processor_wait = ProcessorWait()
        self._runs: deque[StepRun] = deque(maxlen=_KEPT_RUNS)
        self._gpus = EmulatedGpus(
            self.profile,
            self.model,
            gpu_count=tensor_parallel,
            start_seconds=time.monotonic(),
            seed=rank,
            # Its windows and refresh stay those of the real meter. A gain error would show as
            # power over the limit, which no controller that trusts its meter can see.
            exact_meter=True,
        )
        self.reader: GpuReader = EmulatedReader(self._gpus, time.monotonic)
        if replay is not None:
            first = rank * tensor_parallel
            self.reader = PlaybackReader(replay, time.monotonic, first=first, count=tensor_parallel)
        self._trace: PowerTraceWriter | None = None
        self._trace_lock = threading.Lock()
        self._closing = threading.Event()
        self._flusher: threading.Thread | None = None
        if trace_prefix is not None:
            self._trace = PowerTraceWriter(trace_path(trace_prefix, rank))
            self._flusher = threading.Thread(
                target=self._flush_until_closed, name="shaper-power-trace", daemon=True
            )

    def start(self) -> None:
        """Starts writing the trace. Without a trace there is nothing to start."""
        if self._flusher is not None:
            self._flusher.start()

    def launch(self, batch: StepBatch) -> StepRun:
        """Puts a step on the GPUs' timeline now, behind those already there."""
        self._note_stall(time.monotonic(), self._processor_wait.take_seconds())
        run = self._gpus.launch(batch, time.monotonic())
        self._runs.append(run)
        return run

    def wait(self, run: StepRun) -> None:
        """Returns when the step has ended."""
        if not self._real_time:
            return
        late_seconds = sleep_until(run.end_seconds)
        held_up_seconds = self._processor_wait.take_seconds()
        self._note_stall(run.end_seconds, max(late_seconds, held_up_seconds))

    def _note_stall(self, at_seconds: float, late_seconds: float) -> None:
        if late_seconds <= STALL_SECONDS:
            return
        self.stalls += 1
        with self._trace_lock:
            if self._trace is not None:
                self._trace.note_stall(at_seconds, late_seconds)

    def ended(self, run: StepRun) -> bool:
        """Whether the step has ended."""
        return not self._real_time or time.monotonic() >= run.end_seconds

    def take_runs(self) -> list[StepRun]:
        """The true start, end and joules of the steps since the last call (the last
        few thousand of them)."""
        runs = []
        while self._runs:
            runs.append(self._runs.popleft())
        return runs

    def close(self) -> None:
        """Writes what is left of the trace. May be called twice."""
        self._closing.set()
        self._processor_wait.close()
        if self._flusher is not None and self._flusher.is_alive():
            self._flusher.join()
        with self._trace_lock:
            if self._trace is not None:
                self._flush(self._trace)
                self._trace.close()
                self._trace = None

    def _flush_until_closed(self) -> None:
        while not self._closing.wait(_FLUSH_INTERVAL_SECONDS):
            with self._trace_lock:
                if self._trace is not None:
                    self._flush(self._trace)

    def _flush(self, trace: PowerTraceWriter) -> None:
        self._gpus.advance(time.monotonic())
        trace.append(self._gpus.take_segments())
