"""Steps without an engine: a batch of fixed shape, launched straight at a GPU.

`BareRunner` keeps the books; what it launches on is torch on a real GPU
(`kernels.py`) or the emulated GPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from bench.characterise.runner import StepLog
from shaper.core.types import StepBatch
from shaper.emulator.device import EmulatedDevice
from shaper.emulator.shapes import load_shape
from shaper.gpu.reader import GpuReader
from shaper.recording.format import RecordedStep


class Device(Protocol):
    """A GPU that runs steps in the order of their launches."""

    @property
    def reader(self) -> GpuReader:
        """Its meter."""
        ...

    @property
    def kv_tokens(self) -> int:
        """Tokens of context that fit."""
        ...

    @property
    def about(self) -> Mapping[str, Any]:
        """What it is."""
        ...

    def launch(self, batch: StepBatch) -> Any:
        """Starts a step behind those that run; returns a handle."""
        ...

    def wait(self, handle: Any) -> None:
        """Returns when that step has ended."""
        ...

    def close(self) -> None:
        """Lets go of it."""
        ...


class BareRunner:
    """A `Runner` over a `Device`. No prompts are computed: contexts are there from the start."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._log = StepLog()
        self._flying: deque[Any] = deque()
        self._decodes = self._context = 0
        self._chunk = self._chunk_context = self._chunks_left = 0

    @property
    def reader(self) -> GpuReader:
        """The device's meter."""
        return self._device.reader

    @property
    def kv_tokens(self) -> int:
        """Tokens of context that fit."""
        return self._device.kv_tokens

    @property
    def about(self) -> Mapping[str, Any]:
        """What runs."""
        return self._device.about

    def start_decodes(self, batch: int, context_tokens: int) -> None:
        """See `Runner`."""
        self.clear()
        self._decodes, self._context = batch, context_tokens

    def start_chunks(self, context_tokens: int, chunk_tokens: int, count: int) -> None:
        """See `Runner`."""
        self.clear()
        self._chunk_context, self._chunk, self._chunks_left = context_tokens, chunk_tokens, count

    def step(self) -> bool:
        """See `Runner`. Two steps are in flight, as in an engine."""
        batch = self._next()
        if batch is None:
            if not self._flying:
                return False
        else:
            self._log.launched(time.monotonic(), batch)
            self._flying.append(self._device.launch(batch))
        if batch is None or len(self._flying) > 1:
            self._device.wait(self._flying.popleft())
            self._log.returned(time.monotonic())
        return True

    def drain(self) -> None:
        """See `Runner`."""
        while self._flying:
            self._device.wait(self._flying.popleft())
            self._log.returned(time.monotonic())

    def clear(self) -> None:
        """See `Runner`."""
        self.drain()
        self._decodes = self._chunks_left = 0

    def take_steps(self) -> list[RecordedStep]:
        """See `Runner`."""
        return self._log.take()

    def close(self) -> None:
        """See `Runner`."""
        self._device.close()

    def _next(self) -> StepBatch | None:
        if self._decodes:
            self._context += 1
            total = self._decodes * self._context
            return StepBatch(
                decode_requests=self._decodes,
                decode_tokens=self._decodes,
                decode_context_tokens=total,
            )
        if not self._chunks_left:
            return None
        self._chunks_left -= 1
        ends = self._chunk_context + self._chunk
        return StepBatch(
            prefill_requests=1,
            prefill_tokens=self._chunk,
            prefill_context_tokens=ends,
            prefill_token_context_product=self._chunk * ends,
            prefill_squared_tokens=self._chunk**2,
        )


class EmulatedSteps:
    """A `Device` that is an emulated GPU, on the real clock and without vLLM."""

    def __init__(self, gpu: str, model: str) -> None:
        """Raises `UnknownGpuError` and `UnknownModelError`."""
        # It brings torch, and seconds of imports with it.
        from shaper.emulator.kv_cache import available_kv_bytes

        self._emulated = EmulatedDevice(gpu, load_shape(model))
        coefficients = self._emulated.model.coefficients
        room = available_kv_bytes(self._emulated.model, 0.9, 8192)
        per_token = coefficients.kv_bytes_per_token_full + coefficients.kv_bytes_per_token_sliding
        self._kv_tokens = int(room / per_token)

    @property
    def reader(self) -> GpuReader:
        """The emulated meter."""
        return self._emulated.reader

    @property
    def kv_tokens(self) -> int:
        """Tokens of context that fit beside the weights."""
        return self._kv_tokens

    @property
    def about(self) -> Mapping[str, Any]:
        """What runs."""
        return {"runner": "emulated steps, no engine", "kv_cache_tokens": self._kv_tokens}

    def launch(self, batch: StepBatch) -> Any:
        """See `Device`."""
        return self._emulated.launch(batch)

    def wait(self, handle: Any) -> None:
        """See `Device`."""
        self._emulated.wait(handle)

    def close(self) -> None:
        """See `Device`."""
        self._emulated.close()
