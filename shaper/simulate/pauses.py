"""vLLM's schedulers, which in a pause answer at once what they have just answered.

Law. While nothing may run, a poll of vLLM's `schedule()` counts one step up, and finds the same
nothing as the poll before, until a request arrives, leaves or is back. Most polls of an engine
that shares a tight budget are such; a real engine has nothing else to do then, virtual time has.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from shaper.engine.scheduler import ShapedAsyncScheduler, ShapedScheduler


class _Repeating:
    """Repeats an empty output. Stateful field: the one that would come again, if any."""

    _nothing: Any = None

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's. A pause's output is the same object as that of the poll before."""
        paused = self.max_num_scheduled_tokens == 0  # type: ignore[attr-defined]
        if paused and self._nothing is not None:
            self.current_step += 1  # type: ignore[attr-defined]
            return self._nothing
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        # What has finished is told once.
        repeats = paused and not output.finished_req_ids and not output.total_num_scheduled_tokens
        self._nothing = output if repeats else None
        return output

    def add_request(self, request: Any) -> None:
        """vLLM's."""
        self._nothing = None
        super().add_request(request)  # type: ignore[misc]

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's."""
        self._nothing = None
        return super().finish_requests(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's."""
        if scheduler_output.total_num_scheduled_tokens:
            self._nothing = None
        return super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]


class _RepeatingAsync(_Repeating, AsyncScheduler):  # type: ignore[misc]
    """For asynchronous scheduling."""


class _RepeatingSync(_Repeating, Scheduler):  # type: ignore[misc]
    """For synchronous scheduling."""


class VirtualAsyncScheduler(ShapedAsyncScheduler, _RepeatingAsync):
    """The live engine's scheduler over the one above."""


class VirtualScheduler(ShapedScheduler, _RepeatingSync):
    """The same without asynchronous scheduling."""
