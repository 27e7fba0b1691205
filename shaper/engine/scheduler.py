"""The scheduler that vLLM runs: its own, with each step's limits decided before, and with
flex requests that may wait beside its queue.

`power_scheduler` is what `shaper.PowerScheduler` resolves to. vLLM calls it with
what it would give a scheduler class; it returns the subclass of `AsyncScheduler`
or of `Scheduler` that this engine's configuration asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

from shaper.engine.build import attach
from shaper.engine.compat import counts_from_requests, own_scheduler
from shaper.engine.deferral import Deferral
from shaper.engine.protocols import EngineShaper

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class Shaped:
    """What every shaped scheduler adds to vLLM's own. Takes any arguments, since signatures
    differ by version."""

    def __init__(
        self, *args: Any, attach: Callable[[Any], EngineShaper] = attach, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.shaper: EngineShaper = attach(self)
        self.deferral = Deferral(self, self.shaper)

    @property
    def _unpaused(self) -> bool:
        state: PauseState = self.pause_state  # type: ignore[attr-defined]
        return bool(state == PauseState.UNPAUSED)

    def add_request(self, request: Request) -> None:
        """vLLM's, which may then wait outside its queue."""
        # vLLM's own `arrival_time` is of the wall clock, and of another process.
        request.shaper_arrival_seconds = self.shaper.clock()
        super().add_request(request)  # type: ignore[misc]
        self.shaper.changed()
        self.deferral.arrived(request)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's; deferred requests are among its own."""
        if request_ids is not None:
            request_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        found = super().finish_requests(request_ids, *args, **kwargs)  # type: ignore[misc]
        self.shaper.changed()
        self.deferral.finished(request_ids)
        return found

    def get_request_counts(self) -> tuple[int, int]:
        """Running and waiting, deferred requests among the latter."""
        running, waiting = super().get_request_counts()  # type: ignore[misc]
        return running, waiting + len(self.deferral)

    def get_num_unfinished_requests(self) -> int:
        """vLLM's, with the deferred requests; none of them while the engine is paused."""
        count: int = super().get_num_unfinished_requests()  # type: ignore[misc]
        if counts_from_requests(self) or not self._unpaused:
            return count
        return count + len(self.deferral)

    def has_unfinished_requests(self) -> bool:
        """As long as this is true the engine core asks again: a deferred request keeps it so,
        as one in vLLM's queue does, unless the engine is paused."""
        if super().has_unfinished_requests():  # type: ignore[misc]
            return True
        return len(self.deferral) > 0 and self._unpaused

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's schedule() under the limits that the shaper decides."""
        self.deferral.before_schedule()
        run = super().schedule  # type: ignore[misc]
        if args or kwargs:
            run = partial(run, *args, **kwargs)
        output: SchedulerOutput = self.shaper.schedule(run)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        """Notes that a step is back, then goes on as vLLM does."""
        self.shaper.returned(scheduler_output)
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, *args, **kwargs
        )
        self.deferral.refuse(outputs)
        return outputs

    def shutdown(self) -> None:
        """Stops the sampler and removes the status block."""
        self.shaper.close()
        super().shutdown()  # type: ignore[misc]


class ShapedAsyncScheduler(Shaped, AsyncScheduler):
    """For asynchronous scheduling, vLLM's default."""


class ShapedScheduler(Shaped, Scheduler):
    """For synchronous scheduling."""


def _shaped(own: type[Any]) -> type[Any]:
    """vLLM's scheduler of this class, shaped. vLLM has others than the two for some models."""
    known = {AsyncScheduler: ShapedAsyncScheduler, Scheduler: ShapedScheduler}
    return known.get(own) or type(f"Shaped{own.__name__}", (Shaped, own), {})


def power_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """The shaped scheduler for this configuration. `attach` replaces what shapes it."""
    made: Scheduler = _shaped(own_scheduler(vllm_config))(vllm_config, *args, **kwargs)
    return made
