"""One engine in virtual time: vLLM's real scheduler over emulated GPUs, no sleeping.

The loop is that of vLLM's `EngineCore.step_with_batch_queue` with asynchronous
scheduling (two batches in flight) and of `EngineCore.step` without; a step that
schedules nothing costs `EMPTY_STEP_SECONDS`, as it does there. The host is taken
to be infinitely fast otherwise; what it costs on a GPU is in the GPU's profile.

A turn of the loop is one event, or two where it waits for a step:

    turn      take in what has arrived, schedule, launch
    return    the oldest step is back

so that several engines can take part in one order of time (`shaper.simulate.rack`).
"""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shaper.core.model.power_model import StepModel
from shaper.emulator.activate import EMULATE_VARIABLE
from shaper.emulator.batching import RequestTracker, TrackedStep
from shaper.emulator.silicon import EmulatedGpus, StepRun
from shaper.errors import ConfigError

EMPTY_STEP_SECONDS = 0.001
# A step in which nothing is done at all still takes the loop some time.
_IDLE_LOOP_SECONDS = 1e-5


def engine_config(model: str, gpu: str, **arguments: Any) -> Any:
    """vLLM's configuration of an engine of `model` on an emulated `gpu`.

    Must be called before anything else imports vLLM in this process: the platform
    is chosen at import.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ[EMULATE_VARIABLE] = gpu
    from vllm.engine.arg_utils import EngineArgs

    from shaper.emulator.models import model_directory

    defaults: dict[str, Any] = {
        "model": str(model_directory(model)),
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 1024,
        "load_format": "dummy",
        "async_scheduling": True,
        "distributed_executor_backend": "shaper.emulator.executor.EmulatedExecutor",
    }
    return EngineArgs(**(defaults | arguments)).create_engine_config()


def kv_cache(config: Any, model: StepModel, blocks: int | None) -> Any:
    """vLLM's description of a KV cache.

    Args:
        config: of the engine.
        model: of the same engine; knows its memory.
        blocks: how many, with one group for each kind of layer. None: what the GPU's memory
            has room for, as vLLM lays it out.

    Raises:
        ConfigError: the weights don't fit, or not one request of the model's length does.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from shaper.emulator.kv_cache import available_kv_bytes, kv_cache_specs, served_shape
    from shaper.engine.compat import laid_out_kv_cache

    specs = kv_cache_specs(config, served_shape(config))
    if blocks is not None:
        groups: dict[Any, list[str]] = {}
        for name, spec in specs.items():
            groups.setdefault(spec, []).append(name)
        kv_groups = [KVCacheGroupSpec(names, spec) for spec, names in groups.items()]
        return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=kv_groups)
    left_bytes = available_kv_bytes(
        model,
        config.cache_config.gpu_memory_utilization,
        config.scheduler_config.max_num_batched_tokens,
    )
    try:
        return laid_out_kv_cache(config, specs, int(left_bytes))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def new_scheduler(config: Any, kind: Callable[..., Any], cache: Any) -> Any:
    """A scheduler of `kind` for this configuration, with a KV cache from `kv_cache`."""
    from vllm.v1.structured_output import StructuredOutputManager

    config.cache_config.num_gpu_blocks = cache.num_blocks
    block_size = config.cache_config.block_size
    return kind(
        config,
        cache,
        StructuredOutputManager(config),
        block_size=block_size,
        hash_block_size=block_size,
        log_stats=False,
    )


@functools.cache
def _block_hasher(algorithm: str, block_size: int) -> Callable[..., Any]:
    """Made once: before vLLM 0.29 each `init_none_hash` starts every chain of hashes elsewhere."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    hash_fn = get_hash_fn_by_name(algorithm)
    init_none_hash(hash_fn)
    hasher: Callable[..., Any] = get_request_block_hasher(block_size, hash_fn)
    return hasher


def new_request(request_id: str, prompt: list[int], output_tokens: int, config: Any) -> Any:
    """A request of exactly `output_tokens` tokens, with prefix caching as configured."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    cache = config.cache_config
    hasher = None
    if cache.enable_prefix_caching:
        hasher = _block_hasher(cache.prefix_caching_hash_algo, cache.block_size)
    return Request(
        request_id,
        prompt,
        SamplingParams(max_tokens=output_tokens, ignore_eos=True),
        None,
        arrival_time=0.0,
        block_hasher=hasher,
    )


@dataclass(slots=True)
class VirtualRequest:
    """What became of one request."""

    arrival_seconds: float
    token_seconds: list[float] = field(default_factory=list)
    finished_seconds: float | None = None


class _Batch(NamedTuple):
    output: Any
    step: TrackedStep | None
    run: StepRun | None


class VirtualEngine:
    """The engine core's loop over a scheduler and emulated GPUs.

    Args:
        scheduler: vLLM's, shaped or not.
        gpus: run its steps.
        asynchronous: two batches in flight instead of one.
        on_output: gets each `SchedulerOutput` with tokens.
        host_late_seconds: drawn for each step; the host sees its end that much later.

    `now_seconds` is the engine's time; give `lambda: engine.now_seconds` to what
    needs a clock.
    """

    def __init__(
        self,
        scheduler: Any,
        gpus: EmulatedGpus,
        *,
        asynchronous: bool = True,
        on_output: Callable[[Any], None] | None = None,
        host_late_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.scheduler = scheduler
        self.gpus = gpus
        self.now_seconds = 0.0
        self.steps = 0
        self.requests: dict[str, VirtualRequest] = {}
        self._depth = 2 if asynchronous else 1
        self._queue: deque[_Batch] = deque()
        self._inbox: list[Any] = []
        self._return_seconds: float | None = None
        self._executed = False
        self._nothing: Any = None
        self._tracker = RequestTracker()
        self._on_output = on_output
        self._host_late_seconds = host_late_seconds

    def add(self, request: Any) -> None:
        """A request arrives now."""
        self.requests[request.request_id] = VirtualRequest(self.now_seconds)
        self.scheduler.add_request(request)

    def arrive(self, request: Any, at_seconds: float) -> None:
        """A request arrives at a time that is not after `due_seconds`.

        The engine core takes it in at its next turn: while it waits for a step it hears
        nothing. The request's latency counts from its arrival.
        """
        self.requests[request.request_id] = VirtualRequest(at_seconds)
        if not self.busy:
            self.now_seconds = max(self.now_seconds, at_seconds)
        self._inbox.append(request)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue or self._inbox) or self.scheduler.has_requests()

    @property
    def inbox(self) -> Sequence[Any]:
        """Requests that have arrived and that the scheduler has not heard of."""
        return self._inbox

    @property
    def due_seconds(self) -> float:
        """When its next event is due; infinity while there is nothing to do."""
        if self._return_seconds is not None:
            return self._return_seconds
        return self.now_seconds if self.busy else math.inf

    def next_event(self) -> None:
        """Do what is due next; the engine's time is then `due_seconds` or later."""
        if self._return_seconds is None:
            self._turn()
        else:
            self._return()

    def run_until(self, seconds: float) -> None:
        """Step until this time, or until nothing is left to do; then it is that time."""
        while self.now_seconds < seconds and self.busy:
            self.step()
        self.now_seconds = max(self.now_seconds, seconds)
        self.gpus.advance(self.now_seconds)

    def step(self) -> None:
        """One turn of the engine core's loop, with the step that it waits for."""
        if self._return_seconds is None:
            self._turn()
        if self._return_seconds is not None:
            self._return()

    def _turn(self) -> None:
        for request in self._inbox:
            self.scheduler.add_request(request)
        self._inbox.clear()
        self._executed = False
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._executed = output.total_num_scheduled_tokens > 0
            if output is self._nothing and len(self._queue) == self._depth - 1:
                # One more poll of a pause, as the one before; what is queued is this output, too.
                self.now_seconds += EMPTY_STEP_SECONDS
                return
            self._queue.append(self._launch(output))
            if len(self._queue) < self._depth:
                self._after()
                return
        if not self._queue:
            self._after()
            return
        run = self._queue[0].run
        if run is None:
            self._return()
        else:
            seen_seconds = run.end_seconds + self._host_late_seconds()
            self._return_seconds = max(self.now_seconds, seen_seconds)

    def _return(self) -> None:
        if self._return_seconds is not None:
            self.now_seconds, self._return_seconds = self._return_seconds, None
        self._finish(self._queue.popleft())
        self._after()

    def _launch(self, output: Any) -> _Batch:
        step = self._tracker.observe(output)
        if step is None:
            return _Batch(output, None, None)
        self.steps += 1
        if self._on_output is not None:
            self._on_output(output)
        return _Batch(output, step, self.gpus.launch(step.batch, self.now_seconds))

    def _finish(self, batch: _Batch) -> None:
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

        answer = EMPTY_MODEL_RUNNER_OUTPUT
        if batch.step is not None and batch.run is not None:
            self.now_seconds = max(self.now_seconds, batch.run.end_seconds)
            names = [request.request_id for request in batch.step.requests]
            answer = ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                # Which token is of no interest here; 65 is a letter.
                sampled_token_ids=[[] if o is None else [65] for o in batch.step.outputs],
            )
        else:
            self._nothing = batch.output
        for outputs in self.scheduler.update_from_output(batch.output, answer).values():
            for each in outputs.outputs:
                record = self.requests[each.request_id]
                record.token_seconds.extend([self.now_seconds] * len(each.new_token_ids))
                if each.finish_reason is not None:
                    record.finished_seconds = self.now_seconds

    def _after(self) -> None:
        if not self._executed:
            idle = self.scheduler.has_requests()
            self.now_seconds += EMPTY_STEP_SECONDS if idle else _IDLE_LOOP_SECONDS
