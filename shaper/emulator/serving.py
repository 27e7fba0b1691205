"""What `shaper serve --emulate` adds to vLLM's settings, where the user said nothing."""

from __future__ import annotations

import argparse

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.model.work import WorkCoefficients
from shaper.emulator.models import has_tokenizer, model_directory, tokenizer_directory
from shaper.emulator.shapes import load_shape
from shaper.errors import ConfigError

EXECUTOR_CLASS_PATH = "shaper.emulator.executor.EmulatedExecutor"
_GIBIBYTE = 1 << 30
_DEFAULT_UTILIZATION_RATIO = 0.9  # vLLM's default --gpu-memory-utilization
_SMALLEST_CONTEXT_TOKENS = 1024


def batch_defaults(profile: GpuProfile) -> tuple[int, int]:
    """(batched tokens, sequences) that vLLM's server takes by itself on such a GPU.

    The rule of `EngineArgs.get_batch_defaults` (vllm/engine/arg_utils.py, 0.32),
    by memory size; A100s are named there because large batches cost them throughput.
    """
    memory = profile.memory.capacity_bytes
    if memory >= 160 * _GIBIBYTE:
        return 16384, 1024
    if memory >= 70 * _GIBIBYTE and "a100" not in profile.name.lower():
        return 8192, 1024
    return 2048, 256


def fill_in(arguments: argparse.Namespace, profile: GpuProfile) -> float:
    """Turns parsed `vllm serve` arguments into those of an emulated engine, in place.

    Returns:
        Idle power of the engine's GPUs in watts.

    Raises:
        ConfigError: a setting can't be emulated, or the model does not fit.
        UnknownModelError: the model's config can't be read.
    """
    _refuse_unsupported(arguments)
    name = str(arguments.model_tag or arguments.model)
    model = _step_model(name, profile, arguments)
    directory = model_directory(name)
    arguments.model_tag = arguments.model = str(directory)
    if not arguments.served_model_name:
        arguments.served_model_name = [name]
    if arguments.tokenizer is None and not has_tokenizer(directory):
        arguments.tokenizer = str(tokenizer_directory())
    arguments.distributed_executor_backend = EXECUTOR_CLASS_PATH
    arguments.load_format = "dummy"
    tokens, sequences = batch_defaults(profile)
    if arguments.max_num_batched_tokens is None:
        arguments.max_num_batched_tokens = tokens
    if arguments.max_num_seqs is None:
        arguments.max_num_seqs = min(sequences, arguments.max_num_batched_tokens)
    if arguments.async_scheduling is None:
        arguments.async_scheduling = True
    utilization = getattr(arguments, "gpu_memory_utilization", None) or _DEFAULT_UTILIZATION_RATIO
    _fit_context(arguments, model, utilization)
    return model.idle_watts


def _refuse_unsupported(arguments: argparse.Namespace) -> None:
    if arguments.pipeline_parallel_size > 1:
        raise ConfigError(
            "--pipeline-parallel-size is not emulated: leave it out and use --tensor-parallel-size"
        )
    if getattr(arguments, "speculative_config", None) is not None:
        raise ConfigError("--speculative-config is not emulated: leave it out")
    backend = arguments.distributed_executor_backend
    if backend not in (None, EXECUTOR_CLASS_PATH):
        raise ConfigError(
            f"--emulate brings its own executor and contradicts "
            f"--distributed-executor-backend {backend}: leave one of them out"
        )


def _step_model(name: str, profile: GpuProfile, arguments: argparse.Namespace) -> StepModel:
    shape = load_shape(name, method=getattr(arguments, "quantization", None))
    tensor_parallel = arguments.tensor_parallel_size
    try:
        return StepModel(profile, WorkCoefficients.from_shape(shape, tensor_parallel))
    except ValueError as error:
        raise ConfigError(f"--tensor-parallel-size: {error}") from error


def _fit_context(arguments: argparse.Namespace, model: StepModel, utilization: float) -> None:
    """Shortens the context to what the KV cache holds, unless the user named a length."""
    from shaper.emulator.kv_cache import available_kv_bytes

    room = available_kv_bytes(model, utilization, arguments.max_num_batched_tokens)
    coefficients = model.coefficients
    per_token = coefficients.kv_bytes_per_token_full + coefficients.kv_bytes_per_token_sliding
    longest = int(room / per_token) // _SMALLEST_CONTEXT_TOKENS * _SMALLEST_CONTEXT_TOKENS
    if longest < _SMALLEST_CONTEXT_TOKENS:
        raise ConfigError(
            f"{coefficients.shape.name} leaves {model.profile.name} no room for a context of "
            f"{_SMALLEST_CONTEXT_TOKENS} tokens: give a larger --tensor-parallel-size"
        )
    if arguments.max_model_len is None and longest < coefficients.shape.max_context_tokens:
        arguments.max_model_len = longest
