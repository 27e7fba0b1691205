"""A model's GEMMs and attention as bare torch kernels: the load of a step without an engine.

Per layer: fused QKV, attention, output projection, fused gate and up, down; at the end
the vocabulary. Weights and KV cache are random, and nothing is computed that means
anything. Left out: norms, rotary embedding, activation, cache writes and sampling.
Decode attention treats the query heads of a KV head as rows of one query, so that the
cache is read once; a chunk attends its context without a mask and itself with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shaper.core.model.shape import ModelShape
from shaper.core.types import StepBatch
from shaper.errors import ConfigError
from shaper.gpu.reader import GpuReader

_SPARE_BYTES = 4 << 30


class TorchSteps:
    """A `Device` that runs steps with torch.

    Args:
        shape: a dense model.
        reader: the meter.
        device: `cuda`, or `cpu` to try it out.
        kv_tokens: size of the KV cache; by default what the memory has room for.
        largest_chunk: rows of the largest step.

    Raises:
        ConfigError: no CUDA here, too little memory, or a model that is not dense.
    """

    def __init__(
        self,
        shape: ModelShape,
        reader: GpuReader,
        *,
        device: str = "cuda",
        kv_tokens: int | None = None,
        largest_chunk: int = 8192,
    ) -> None:
        try:
            import torch
        except ImportError as error:
            raise ConfigError("--torch-only needs torch, which is not installed") from error
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "--torch-only needs CUDA, and torch finds none here; "
                "give --emulate h200-sxm to run against the emulated GPU"
            )
        if shape.moe_layers or shape.sliding_layers:
            raise ConfigError(f"--torch-only runs dense models, and {shape.name} is not one")
        self._torch = torch
        self._reader = reader
        self._shape = shape
        self._device = device
        self._dtype = torch.bfloat16
        self._rows = largest_chunk
        self._layers: list[Any] = []
        self._caches: list[Any] = []
        self._logits: Any = None
        try:
            self._allocate(kv_tokens)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{shape.name} does not fit this GPU's memory") from error

    @property
    def reader(self) -> GpuReader:
        """The meter."""
        return self._reader

    @property
    def kv_tokens(self) -> int:
        """Tokens of the KV cache."""
        return self._kv_tokens

    @property
    def about(self) -> Mapping[str, Any]:
        """What runs."""
        return {
            "runner": "torch GEMMs and attention",
            "torch": str(self._torch.__version__),
            "kv_cache_tokens": self._kv_tokens,
        }

    def launch(self, batch: StepBatch) -> Any:
        """Launches all kernels of a step; returns an event behind them."""
        with self._torch.inference_mode():
            self._run(batch)
        if self._device != "cuda":
            return None
        event = self._torch.cuda.Event(blocking=True)
        event.record()
        return event

    def wait(self, handle: Any) -> None:
        """Returns when that step's kernels have run."""
        if handle is not None:
            handle.synchronize()

    def close(self) -> None:
        """Frees the memory. May be called twice."""
        self._layers, self._caches, self._logits = [], [], None
        if self._device == "cuda":
            self._torch.cuda.empty_cache()

    def _allocate(self, kv_tokens: int | None) -> None:
        shape = self._shape
        width, heads, kv_heads = shape.hidden_size, shape.attention_heads, shape.kv_heads
        q_width, kv_width = heads * shape.head_dim, kv_heads * shape.head_dim
        inner = shape.intermediate_size
        sizes = (
            (width, q_width + 2 * kv_width),
            (q_width, width),
            (width, 2 * inner),
            (inner, width),
        )
        self._layers = [tuple(self._random(*size) for size in sizes) for _ in range(shape.layers)]
        self._logits = self._random(width, shape.vocab_size)
        self._inputs = {size: self._random(self._rows, size) for size in {width, q_width, inner}}
        self._queries = self._random(self._rows, heads, shape.head_dim)
        per_token = 2 * kv_width * 2 * shape.layers
        if kv_tokens is None:
            free = self._torch.cuda.mem_get_info()[0]
            kv_tokens = int((free - _SPARE_BYTES) / per_token)
        if kv_tokens < 2 * self._rows:
            raise ConfigError(f"{shape.name} leaves no room for a KV cache on this GPU")
        self._kv_tokens = kv_tokens
        self._caches = [
            (
                self._random(kv_tokens, kv_heads, shape.head_dim),
                self._random(kv_tokens, kv_heads, shape.head_dim),
            )
            for _ in range(shape.layers)
        ]

    def _random(self, *size: int) -> Any:
        empty = self._torch.empty(size, dtype=self._dtype, device=self._device)
        return empty.uniform_(-0.02, 0.02)

    def _run(self, batch: StepBatch) -> None:
        torch = self._torch
        rows = batch.tokens
        if rows > self._rows:
            raise ConfigError(f"a step of {rows} tokens is above the largest, {self._rows}")
        for weights, cache in zip(self._layers, self._caches, strict=True):
            for weight in weights[:1]:
                torch.matmul(self._inputs[weight.shape[0]][:rows], weight)
            if batch.decode_requests:
                self._decode(batch, *cache)
            else:
                self._prefill(batch, *cache)
            for weight in weights[1:]:
                torch.matmul(self._inputs[weight.shape[0]][:rows], weight)
        sampled = batch.decode_requests + batch.prefill_requests
        logits = torch.matmul(self._inputs[self._shape.hidden_size][:sampled], self._logits)
        torch.argmax(logits, dim=-1)

    def _decode(self, batch: StepBatch, keys: Any, values: Any) -> None:
        shape, count = self._shape, batch.decode_requests
        context = batch.decode_context_tokens // count
        group = shape.attention_heads // shape.kv_heads
        query = self._queries[:count].view(count, shape.kv_heads, group, shape.head_dim)

        def cached(cache: Any) -> Any:
            part = cache[: count * context]
            return part.view(count, context, shape.kv_heads, shape.head_dim).transpose(1, 2)

        attend = self._torch.nn.functional.scaled_dot_product_attention
        attend(query, cached(keys), cached(values))

    def _prefill(self, batch: StepBatch, keys: Any, values: Any) -> None:
        chunk = batch.prefill_tokens
        before = batch.prefill_context_tokens - chunk
        query = self._queries[:chunk].transpose(0, 1).unsqueeze(0)
        attend = self._torch.nn.functional.scaled_dot_product_attention

        def cached(cache: Any, start: int, end: int) -> Any:
            return cache[start:end].transpose(0, 1).unsqueeze(0)

        for start, end, causal in ((0, before, False), (before, before + chunk, True)):
            if end > start:
                attend(
                    query,
                    cached(keys, start, end),
                    cached(values, start, end),
                    is_causal=causal,
                    enable_gqa=True,
                )
