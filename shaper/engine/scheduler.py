"""The scheduler that vLLM runs: its own, with each step's limits decided before.

`power_scheduler` is what `shaper.PowerScheduler` resolves to. vLLM calls it with
what it would give a scheduler class; it returns the subclass of `AsyncScheduler`
or of `Scheduler` that this engine's configuration asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from shaper.engine.runtime import EngineShaper
from shaper.engine.startup import attach

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput


class _Shaped:
    """What both schedulers add. Takes any arguments: signatures differ by version."""

    def __init__(
        self, *args: Any, attach: Callable[[Any], EngineShaper] = attach, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.shaper: EngineShaper = attach(self)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's schedule() under the limits that the shaper decides."""
        run = super().schedule  # type: ignore[misc]
        output: SchedulerOutput = self.shaper.schedule(lambda: run(*args, **kwargs))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        """Notes that a step is back, then goes on as vLLM does."""
        self.shaper.returned(scheduler_output)
        return super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def shutdown(self) -> None:
        """Stops the sampler and removes the status block."""
        self.shaper.close()
        super().shutdown()  # type: ignore[misc]


class ShapedAsyncScheduler(_Shaped, AsyncScheduler):
    """For asynchronous scheduling, vLLM's default."""


class ShapedScheduler(_Shaped, Scheduler):
    """For synchronous scheduling."""


def power_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """The shaped scheduler for this configuration. `attach` replaces what shapes it."""
    asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
    kind = ShapedAsyncScheduler if asynchronous else ShapedScheduler
    return kind(vllm_config, *args, **kwargs)
