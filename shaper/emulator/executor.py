"""vLLM's executor over an emulated GPU: steps take the modelled time, tokens are made up.

The device is a serial timeline: a step starts when it is launched or when the
one before it ends, whichever is later. `sample_tokens` hands out a future whose
`result()` waits for the step's end on the real clock. No worker process exists.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    LogprobsLists,
    LogprobsTensors,
    ModelRunnerOutput,
)

from shaper.core.types import StepBatch
from shaper.emulator.activate import (
    EMULATE_VARIABLE,
    REPLAY_VARIABLE,
    TIME_SCALE_VARIABLE,
    TRACE_VARIABLE,
)
from shaper.emulator.batching import RequestTracker, TrackedStep
from shaper.emulator.device import EmulatedDevice
from shaper.emulator.kv_cache import available_kv_bytes, kv_cache_specs, served_shape
from shaper.emulator.sampling import TokenSource, logprob_rows
from shaper.emulator.tokenizer import BYTE_TOKENS
from shaper.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from shaper.emulator.silicon import StepRun
    from shaper.gpu.reader import GpuReader

_executors: weakref.WeakValueDictionary[int, EmulatedExecutor] = weakref.WeakValueDictionary()


def emulated_reader(vllm_config: VllmConfig) -> GpuReader | None:
    """The meter of the emulated GPUs that serve `vllm_config` in this process.

    None where no `EmulatedExecutor` was made for this very object.
    """
    executor = _executors.get(id(vllm_config))
    if executor is None or executor.vllm_config is not vllm_config:
        return None
    return executor.device.reader


class _StepFuture(Future[Any]):
    """A step's output, which is there when the emulated step has ended."""

    def __init__(self, device: EmulatedDevice, run: StepRun, output: Any) -> None:
        super().__init__()
        self._device = device
        self._run = run
        self._output = output

    def result(self, timeout: float | None = None) -> Any:
        self._device.wait(self._run)
        return self._output

    def done(self) -> bool:
        return self._device.ended(self._run)


def _ready(output: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(output)
    return future


class EmulatedExecutor(Executor):
    """Runs the steps of one engine on emulated GPUs.

    Raises:
        ConfigError: pipeline parallelism, speculative decoding or pooling models,
            which are not emulated; or a model that does not fit the GPU's memory.
    """

    uses_ray = False
    supports_pp = False

    device: EmulatedDevice

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Steps are launched ahead, as on a GPU."""
        return True

    def _init_executor(self) -> None:
        config = self.vllm_config
        _refuse_unsupported(config)
        self._shape = served_shape(config)
        parallel = config.parallel_config
        replay = os.environ.get(REPLAY_VARIABLE)
        self.device = EmulatedDevice(
            os.environ[EMULATE_VARIABLE],
            self._shape,
            tensor_parallel=parallel.tensor_parallel_size,
            rank=getattr(parallel, "data_parallel_index", parallel.data_parallel_rank),
            trace_prefix=os.environ.get(TRACE_VARIABLE) or None,
            replay=Path(replay) if replay else None,
            real_time=_real_time(),
        )
        self._tracker = RequestTracker()
        self._launched: deque[tuple[TrackedStep, StepRun]] = deque()
        self.device.start()
        _executors[id(config)] = self

    @cached_property
    def _tokens(self) -> TokenSource:
        # Made at the first step: while it starts, vLLM may still shorten the context.
        model = self.vllm_config.model_config
        return TokenSource(model.get_vocab_size(), model.max_model_len)

    # What EngineCore asks while it starts.

    def determine_available_memory(self) -> list[int]:
        """Bytes for the KV cache, per GPU."""
        config = self.vllm_config
        return [
            available_kv_bytes(
                self.device.model,
                config.cache_config.gpu_memory_utilization,
                config.scheduler_config.max_num_batched_tokens,
            )
        ]

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """One spec per layer, of what one GPU holds."""
        return [kv_cache_specs(self.vllm_config, self._shape)]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """Any will do: there is no cache in memory."""
        return [["LBNHC"]]

    def set_kv_cache_layout(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to lay out."""

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """Nothing to allocate."""

    def compile_or_warm_up_model(self) -> None:
        """Nothing to compile."""

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """Text generation only."""
        return ("generate",)

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """There are no workers: every control call succeeds and does nothing.

        LoRA calls answer True, since vLLM asks whether all workers agree.
        """
        answer = [True if method in _CALLS_THAT_CONFIRM else None]
        return _ready(answer) if non_block else answer

    # Steps.

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Launches a step. A step without tokens has its (empty) output at once."""
        step = self._tracker.observe(scheduler_output)
        if step is None:
            return _ready(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        self._launched.append((step, self.device.launch(step.batch)))
        return _ready(None) if non_block else None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The tokens of the oldest step that has none yet; there when it has ended."""
        step, run = self._launched.popleft()
        future = _StepFuture(self.device, run, self._output(step, grammar_output))
        return future if non_block else future.result()

    def execute_dummy_batch(self) -> None:
        """Keeps step with data-parallel ranks that have work: one token."""
        one = StepBatch(decode_requests=1, decode_tokens=1, decode_context_tokens=1)
        self.device.wait(self.device.launch(one))

    def take_draft_token_ids(self) -> None:
        """No speculative decoding."""

    def check_health(self) -> None:
        """Always well."""

    def shutdown(self) -> None:
        """Writes the rest of the power trace. May be called twice."""
        if hasattr(self, "device"):
            self.device.close()

    def _output(self, step: TrackedStep, grammar_output: Any) -> ModelRunnerOutput:
        bitmasks: dict[str, npt.NDArray[np.int32]] = {}
        if grammar_output is not None:
            bitmasks = dict(
                zip(
                    grammar_output.structured_output_request_ids,
                    grammar_output.grammar_bitmask,
                    strict=False,
                )
            )
        pick = self._tokens.pick
        tokens: list[int | None] = [
            None if output is None else pick(request, output, bitmasks.get(request.request_id))
            for request, output in zip(step.requests, step.outputs, strict=True)
        ]
        names = [request.request_id for request in step.requests]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] if token is None else [token] for token in tokens],
            logprobs=self._logprobs(step, tokens),
            prompt_logprobs_dict=self._prompt_logprobs(step, tokens),
        )

    def _logprobs(self, step: TrackedStep, tokens: list[int | None]) -> LogprobsLists | None:
        counts = [
            self._columns(getattr(request.sampling_params, "num_logprobs", None))
            for request in step.requests
        ]
        if not any(count is not None for count in counts):
            return None
        widest = max(count for count in counts if count is not None)
        return LogprobsLists(*logprob_rows(tokens, widest, self._vocabulary_size))

    def _prompt_logprobs(
        self, step: TrackedStep, tokens: list[int | None]
    ) -> dict[str, LogprobsTensors | None]:
        answers: dict[str, LogprobsTensors | None] = {}
        for request, token in zip(step.requests, tokens, strict=True):
            if token is None or not request.prompt_logprobs_due:
                continue
            request.prompt_logprobs_due = False
            count = self._columns(request.sampling_params.prompt_logprobs) or 0
            rows = logprob_rows((request.prompt_token_ids or [])[1:], count, self._vocabulary_size)
            answers[request.request_id] = LogprobsTensors(*(torch.from_numpy(row) for row in rows))
        return answers

    @property
    def _vocabulary_size(self) -> int:
        return int(self.vllm_config.model_config.get_vocab_size())

    def _columns(self, count: int | None) -> int | None:
        # -1 asks for the whole vocabulary; what an emulated model can say are bytes.
        return min(self._vocabulary_size, BYTE_TOKENS) - 1 if count == -1 else count


_CALLS_THAT_CONFIRM = frozenset({"add_lora", "remove_lora", "pin_lora"})


def _real_time() -> bool:
    text = os.environ.get(TIME_SCALE_VARIABLE, "1")
    if text not in ("0", "1"):
        raise ConfigError(
            f"{TIME_SCALE_VARIABLE}={text!r} must be 1 (steps take their modelled time) "
            "or 0 (they take none)"
        )
    return text == "1"


def _refuse_unsupported(config: VllmConfig) -> None:
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError(
            "pipeline parallelism is not emulated: leave out --pipeline-parallel-size, "
            "use --tensor-parallel-size"
        )
    if config.speculative_config is not None:
        raise ConfigError("speculative decoding is not emulated: leave out --speculative-config")
    if config.model_config.runner_type != "generate":
        raise ConfigError("only text generation is emulated, not pooling models")
