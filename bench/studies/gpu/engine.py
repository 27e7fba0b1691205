"""vLLM's engine core in this process, stepped by hand, on a real or an emulated GPU.

Asynchronous scheduling is on, as it is by default in a server: a step is launched while
the one before it runs. Chunks come behind a shared prefix that the prefix cache holds,
so that a chunk of exactly so many tokens runs at exactly that context and nothing else
runs between two of them. Nothing here imports vLLM before the constructor runs: the
platform is chosen at import, by the environment.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from bench.studies.gpu.plan import MAX_BATCHED_TOKENS, MAX_MODEL_LEN, MAX_SEQUENCES
from shaper.core.types import StepBatch
from shaper.emulator.activate import EMULATE_VARIABLE
from shaper.emulator.batching import RequestTracker
from shaper.emulator.models import model_directory
from shaper.engine.compat import vllm_version
from shaper.errors import EngineError
from shaper.gpu.reader import GpuReader
from shaper.recording.format import RecordedStep

_EMULATED_EXECUTOR = "shaper.emulator.executor.EmulatedExecutor"
# More turns of the engine's loop than any preparation takes; beyond it something is stuck.
_MOST_TURNS = 100_000


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine is started."""

    model: str = "llama-3.1-8b"
    emulate: str | None = None
    attention_backend: str | None = None
    memory_ratio: float = 0.9
    enforce_eager: bool = False
    max_model_len: int = MAX_MODEL_LEN
    max_num_seqs: int = MAX_SEQUENCES


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What `EngineArgs` is called with."""
    arguments: dict[str, Any] = {
        "model": str(model_directory(settings.model)),
        "load_format": "dummy",
        # Prompts are token ids, and the output is not read.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "gpu_memory_utilization": settings.memory_ratio,
        "enable_prefix_caching": True,
        "async_scheduling": True,
        "enforce_eager": settings.enforce_eager,
        "disable_log_stats": True,
    }
    if settings.attention_backend:
        arguments["attention_backend"] = settings.attention_backend
    if settings.emulate:
        arguments["distributed_executor_backend"] = _EMULATED_EXECUTOR
    return arguments


def set_environment(emulate: str | None) -> None:
    """What vLLM reads from the environment at import. Call it before anything imports vLLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "1")
    # Without a network vLLM finds no address of its own.
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if emulate:
        os.environ[EMULATE_VARIABLE] = emulate


class StepLog:
    """Pairs launches with ends, in order. A step starts when it was launched or when its
    predecessor ended, whichever is later, as in a live engine's recording."""

    def __init__(self) -> None:
        self._flying: deque[tuple[float, StepBatch | None]] = deque()
        self._emitted = 0
        self._done: list[RecordedStep] = []
        self._last_end_seconds = float("-inf")
        self.last_batch: StepBatch | None = None
        """Work of the newest launch; None for an empty step."""

    def launched(self, at_seconds: float, batch: StepBatch | None) -> None:
        """A step was launched; None for one without tokens."""
        self.last_batch = batch
        self._flying.append((at_seconds, batch))

    def ended(self, at_seconds: float) -> None:
        """All launched steps have ended, the newest of them now."""
        while self._emitted < len(self._flying):
            self._emit(at_seconds)

    def returned(self, at_seconds: float) -> None:
        """The oldest step's output is here; its end is now, unless it was known before."""
        if not self._emitted:
            self._emit(at_seconds)
        self._emitted -= 1
        self._flying.popleft()

    def _emit(self, at_seconds: float) -> None:
        launch_seconds, batch = self._flying[self._emitted]
        self._emitted += 1
        start = max(launch_seconds, self._last_end_seconds)
        if batch is not None and at_seconds > start:
            self._done.append(RecordedStep(start, at_seconds, batch))
            self._last_end_seconds = at_seconds

    def take(self) -> list[RecordedStep]:
        """The steps that ended since the last take."""
        done, self._done = self._done, []
        return done


class EngineRunner:
    """vLLM's engine core, whose steps are exactly what was asked for.

    Args:
        settings: of the engine.
        reader: the meter; None to take the emulated GPU's.

    Raises:
        EngineError: vLLM is missing, or its engine does not start; the cause is chained.
    """

    def __init__(self, settings: EngineSettings, reader: GpuReader | None = None) -> None:
        version = vllm_version()
        set_environment(settings.emulate)
        try:
            self._core = _start(settings)
        # Whatever a driver, a compiler or a kernel library raises ends up here.
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(
                f"vLLM {version} does not start here ({first_line}); "
                "try --attention-backend or --enforce-eager"
            ) from error
        self._settings = settings
        self._closed = False
        self._log = StepLog()
        self._tracker = RequestTracker()
        self._random = np.random.default_rng(0)
        self._count = 0
        self._live: list[str] = []
        self._token_budget = self._core.scheduler.max_num_scheduled_tokens
        self._watch(self._core.scheduler)
        config = self._core.vllm_config
        self.reader = reader if reader is not None else _emulated_reader(config)
        """The meter of this engine's GPU."""
        self._vocabulary = int(config.model_config.get_vocab_size())
        cache = config.cache_config
        tokens = int(cache.num_gpu_blocks) * int(cache.block_size)
        # A margin for blocks that are not full.
        self.kv_tokens = int(tokens * 0.97) - settings.max_num_seqs * int(cache.block_size)
        self.about: Mapping[str, Any] = {
            "runner": "vllm",
            "vllm": version,
            "torch": metadata.version("torch"),
            "attention_backend": settings.attention_backend or "vLLM's choice",
            "enforce_eager": settings.enforce_eager,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "sampling": "temperature 1",
            "kv_cache_tokens": tokens,
        }

    def start_decodes(self, batch: int, context_tokens: int) -> None:
        """Computes `batch` prompts; returns once all of them decode, a token more each step."""
        self.clear()
        self._core.scheduler.max_num_scheduled_tokens = self._token_budget
        most = self._settings.max_model_len - context_tokens - 1
        for _ in range(batch):
            self._add(self._prompt(context_tokens), most)
        for _ in range(_MOST_TURNS):
            self.step()
            newest = self._log.last_batch
            if newest and newest.decode_requests == batch and not newest.prefill_requests:
                self.drain()
                return
        raise EngineError(f"vLLM did not bring {batch} requests of {context_tokens} tokens to run")

    def start_chunks(self, context_tokens: int, chunk_tokens: int, count: int) -> None:
        """Makes the next `count` steps chunks of one size, each after `context_tokens` tokens."""
        self.clear()
        scheduler = self._core.scheduler
        scheduler.max_num_scheduled_tokens = self._token_budget
        prefix = self._prompt(context_tokens)
        self._add([*prefix, *self._prompt(1)], 1)
        while self.step():
            pass
        self._live.clear()
        scheduler.max_num_scheduled_tokens = chunk_tokens
        for _ in range(count):
            self._add([*prefix, *self._prompt(chunk_tokens)], 1)

    def step(self) -> bool:
        """One step right behind the last; False when nothing is left to run."""
        core = self._core
        if not core.scheduler.has_requests() and not core.batch_queue:
            return False
        _, executed = core.step_fn()
        core.post_step(executed)
        return True

    def drain(self) -> None:
        """Waits for the newest step; its output is handed to the scheduler later."""
        if self._core.batch_queue:
            self._core.batch_queue[0][0].result()
            self._log.ended(time.monotonic())

    def clear(self) -> None:
        """Aborts what still runs and lets the scheduler forget it."""
        self.drain()
        if self._live:
            self._core.abort_requests(self._live)
            self._live = []
        for _ in range(_MOST_TURNS):
            if not self.step():
                return
        raise EngineError("vLLM does not let go of aborted requests")

    def take_steps(self) -> list[RecordedStep]:
        """The steps that ended since the last call."""
        return self._log.take()

    def close(self) -> None:
        """Shuts the engine down."""
        if not self._closed:
            self._closed = True
            self._core.shutdown()

    def _prompt(self, tokens: int) -> list[int]:
        found: list[int] = self._random.integers(
            1, max(2, self._vocabulary * 9 // 10), tokens
        ).tolist()
        return found

    def _add(self, prompt: list[int], output_tokens: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self._count += 1
        name = f"study-{self._count}"
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                temperature=1.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
            ),
            pooling_params=None,
            block_hasher=self._core.request_block_hasher,
        )
        self._live.append(name)
        self._core.add_request(request)

    def _watch(self, scheduler: Any) -> None:
        """Notes each step when it is launched and when its output is back."""
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def noted_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            step = self._tracker.observe(output)
            self._log.launched(time.monotonic(), None if step is None else step.batch)
            return output

        def noted_update(*args: Any, **kwargs: Any) -> Any:
            self._log.returned(time.monotonic())
            return update(*args, **kwargs)

        scheduler.schedule, scheduler.update_from_output = noted_schedule, noted_update


def _start(settings: EngineSettings) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    config = EngineArgs(**engine_arguments(settings)).create_engine_config()
    return EngineCore(config, Executor.get_class(config), log_stats=False)


def _emulated_reader(config: Any) -> GpuReader:
    from shaper.emulator.executor import emulated_reader

    reader = emulated_reader(config)
    if reader is None:
        raise EngineError("the engine does not run on an emulated GPU: is the plug-in installed?")
    return reader
