"""What is measured, in which order, for how long, and what no longer fits the time there is.

The stages stand in the order of what matters most. The first four step one vLLM engine by
hand; each server of the others is a process of its own, and the unshaped one goes first, since
budgets are shares of its peak.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shaper.core.types import PowerLimit

ENGINE_STAGES = ("gap", "decode", "prefill", "cap")
UNSHAPED = "unshaped"
TOTAL_MINUTES = 12.0
STAGE_SECONDS = 240.0
"""Of one stage; a server's start is part of it, the engine's start is not."""
WINDOW_SECONDS = 0.1
"""Of the budgets: the shortest that a GPU's own readings can say anything about."""
MAX_MODEL_LEN = 16448
MAX_SEQUENCES = 256
MAX_BATCHED_TOKENS = 8192
"""The engine and the servers share these three, so that they share what vLLM compiles."""

# A first start on a GPU compiles the model and captures graphs, for a time not known before.
FIRST_START_SECONDS = 90.0
FIRST_EMULATED_START_SECONDS = 40.0
DRAIN_SECONDS = 60.0
"""How long requests may still run after the last arrival."""
_USUAL_DRAIN_SECONDS = 15.0
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The points of the engine's stages. Contexts of chunks count the tokens before the chunk."""

    seconds_per_point: float = 3.0
    idle_seconds: float = 8.0
    heat_seconds: float = 30.0
    """Of the heaviest load, between the cold and the hot cadences."""
    settle_seconds: float = 0.3
    """Of the same load, before a point is measured."""
    cadence_batches: tuple[int, ...] = (16, 32)
    cadence_seconds: tuple[float, ...] = (0.008, 0.012, 0.025, 0.040)
    cadence_context_tokens: int = 512
    decode_batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    contexts_tokens: tuple[int, ...] = (512, 4096)
    chunks_tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    wave_seconds: tuple[float, ...] = (0.05, 0.2, 1.0)
    """Square waves of load last this long each."""
    wave_total_seconds: float = 4.0
    """Of one wave; at least two periods are run."""
    wave_chunk_tokens: int = 512
    cap_chunk_tokens: int = 8192
    sample_interval_seconds: float = 0.02


QUICK = Plan(
    seconds_per_point=0.4,
    idle_seconds=0.4,
    heat_seconds=1.0,
    settle_seconds=0.05,
    cadence_seconds=(0.012, 0.025, 0.040),
    cadence_context_tokens=256,
    decode_batches=(1, 8, 32),
    contexts_tokens=(256, 1024),
    chunks_tokens=(128, 512, 2048),
    wave_seconds=(0.1, 0.3),
    wave_total_seconds=1.0,
    cap_chunk_tokens=2048,
)


@dataclass(frozen=True, slots=True)
class Run:
    """One server under the traffic. It has a limit where `budget_ratio` says so."""

    name: str
    max_num_batched_tokens: int = MAX_BATCHED_TOKENS
    max_num_seqs: int = MAX_SEQUENCES
    budget_ratio: float | None = None
    """Of the unshaped 100 ms peak; None: no limit."""
    itl_target_seconds: float | None = None

    def limit(self, peak_watts: float) -> PowerLimit | None:
        """The power limit, by the unshaped run's highest 100 ms mean."""
        if self.budget_ratio is None:
            return None
        return PowerLimit(round(self.budget_ratio * peak_watts, 1), WINDOW_SECONDS)


RUNS = {
    run.name: run
    for run in (
        Run(UNSHAPED),
        Run("shaped", budget_ratio=0.70, itl_target_seconds=0.050),
        Run("shaped-no-itl", budget_ratio=0.70),
        Run("shaped-85", budget_ratio=0.85, itl_target_seconds=0.050),
        Run("static", max_num_batched_tokens=2048, max_num_seqs=64),
    )
}
DEFAULT_STAGES = (*ENGINE_STAGES, UNSHAPED, "shaped")
STAGES = (*ENGINE_STAGES, *RUNS)


class Budget:
    """The time left, of the whole run and of the stage.

    Args:
        end_seconds: of the run, on `clock`.
        stage_seconds: of each stage.
        clock: monotonic, the same in every process of the machine.
    """

    def __init__(
        self,
        end_seconds: float,
        stage_seconds: float = STAGE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.end_seconds = end_seconds
        self._clock = clock
        self._stage_seconds = stage_seconds
        self.start_stage()

    def start_stage(self) -> None:
        """A new stage has its own time, within that of the whole."""
        self._stage_end_seconds = self._clock() + self._stage_seconds

    @property
    def left_seconds(self) -> float:
        """Until the stage or the run must end."""
        return min(self.end_seconds, self._stage_end_seconds) - self._clock()


def expected_seconds(start_seconds: float, warm_up_seconds: float, span_seconds: float) -> float:
    """What a server's stage takes from its start to its end."""
    return start_seconds + warm_up_seconds + span_seconds + _USUAL_DRAIN_SECONDS + _STOP_SECONDS
