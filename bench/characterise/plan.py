"""What is measured, for how long, and what no longer fits the time there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

STAGES = ("idle", "cadence", "decode", "prefill", "meter", "reads")

TOTAL_SECONDS = 720.0
"""Of all stages, the engine's start included."""
STAGE_SECONDS = 480.0
"""Of one stage, the engine's start included where the stage runs alone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The points of each stage. Contexts of chunks count the tokens before the chunk."""

    seconds_per_point: float = 4.0
    idle_seconds: float = 10.0
    settle_seconds: float = 0.3
    """Of the same load, before a point is measured."""
    cadence_batches: tuple[int, ...] = (16, 32)
    cadence_seconds: tuple[float, ...] = (0.008, 0.012, 0.016, 0.025, 0.040)
    cadence_context_tokens: int = 512
    decode_batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    contexts_tokens: tuple[int, ...] = (512, 4096)
    chunks_tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    wave_seconds: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    """Load and rest of the square waves last this long each."""
    wave_total_seconds: float = 3.0
    """Of one wave; at least two periods are run."""
    wave_chunk_tokens: int = 512
    cap_chunk_tokens: int = 8192
    read_calls: int = 200
    sample_interval_seconds: float = 0.02

    @property
    def longest_tokens(self) -> int:
        """The longest sequence that any point reaches, with room to spare."""
        chunk = max((*self.chunks_tokens, self.cap_chunk_tokens, self.wave_chunk_tokens))
        return max((*self.contexts_tokens, self.cadence_context_tokens)) * 2 + chunk + 64

    @property
    def largest_batch(self) -> int:
        """The most requests that decode together."""
        return max((*self.decode_batches, *self.cadence_batches))


QUICK = Plan(
    seconds_per_point=0.4,
    idle_seconds=0.4,
    settle_seconds=0.05,
    cadence_seconds=(0.012, 0.025, 0.040),
    cadence_context_tokens=256,
    decode_batches=(1, 8, 32),
    contexts_tokens=(256, 1024),
    chunks_tokens=(128, 512, 2048),
    wave_seconds=(0.1, 0.3),
    wave_total_seconds=1.0,
    cap_chunk_tokens=2048,
    read_calls=20,
)


class Budget:
    """The time left, of the whole run and of the stage."""

    def __init__(
        self,
        total_seconds: float = TOTAL_SECONDS,
        stage_seconds: float = STAGE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._stage_seconds = stage_seconds
        self._end_seconds = clock() + total_seconds
        self._stage_end_seconds = clock() + stage_seconds

    def start_stage(self) -> None:
        """A new stage has its own time, within that of the whole."""
        self._stage_end_seconds = self._clock() + self._stage_seconds

    @property
    def left_seconds(self) -> float:
        """Until the stage or the run must end."""
        return min(self._end_seconds, self._stage_end_seconds) - self._clock()

    def fits(self, seconds: float) -> bool:
        """Whether something that takes this long still fits."""
        return seconds <= self.left_seconds
