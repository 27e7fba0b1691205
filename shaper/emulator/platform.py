"""vLLM's platform for an emulated GPU: no device, no compiled extension, async scheduling kept.

To vLLM it is a CPU (`PlatformEnum.CPU`: an out-of-tree platform would be asked
to empty an accelerator's cache at shutdown), but one that runs nothing itself:
`shaper.emulator.executor.EmulatedExecutor` answers for the workers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from shaper.emulator.activate import EMULATE_VARIABLE
from shaper.gpu.profiles import load_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXECUTOR_CLASS_PATH = "shaper.emulator.executor.EmulatedExecutor"


class EmulatedPlatform(Platform):
    """The emulated GPU as vLLM's configuration sees it."""

    _enum = PlatformEnum.CPU
    device_name = "emulated"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """The name given with `SHAPER_EMULATE`."""
        return os.environ.get(EMULATE_VARIABLE, "emulated")

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        """One name per device."""
        return f"{cls.get_device_name()}-{device_id}"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes of memory of the emulated GPU."""
        return int(load_profile(cls.get_device_name()).memory.capacity_bytes)

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:
        """Nothing is allocated on a GPU that does not exist."""
        return 0.0

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Run nothing, compile nothing. EngineCore calls this again on its copy."""
        from vllm.config import CompilationMode, CUDAGraphMode

        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":
            parallel.worker_cls = "vllm.v1.worker.worker_base.WorkerBase"
        if parallel.distributed_executor_backend in (None, "uni", "mp"):
            parallel.distributed_executor_backend = EXECUTOR_CLASS_PATH
        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        compilation.cudagraph_capture_sizes = []

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: VllmConfig) -> None:
        """No attention backend has a say."""

    @classmethod
    def import_kernels(cls) -> None:
        """There are none."""

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        """Named because vLLM asks for one; never instantiated."""
        return "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Sliding-window layers get block tables of their own, as on a GPU."""
        return True

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """There is no device to copy to."""
        return False

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """Every dtype will do."""

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is nothing to select."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Nothing draws from a device's generator."""

    @classmethod
    def inference_mode(cls) -> Any:
        """As on a CPU."""
        return torch.no_grad()
