"""Applies a step's limits to vLLM's scheduler, and puts everything back afterwards.

Law of the rotation. Where only `cap` of `n` ready decodes may run, each runs for `block`
steps and then goes to the back of the queue, so none waits for more than

    (ceil(n / cap) - 1) * block <= max(LONGEST_BLOCK, ceil(n / cap) - 1)

steps; one that becomes ready meanwhile queues behind those that wait. Where `n` and `cap`
change, turns end early for those that have waited for `LONGEST_BLOCK` steps, and the bound
is `LONGEST_BLOCK + ceil(n / cap)`. A block spares work: runner V1 copies all token ids of
a request that comes back to the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from shaper.core.types import UNLIMITED, StepLimits
from shaper.engine.compat import admission_limit
from shaper.engine.queue import LoadQueue
from shaper.engine.running_batch import RunningBatch, decode_tokens, is_ready_decode
from shaper.engine.waiting import Waiting

# Steps of a decode's turn. At 10 ms a step a request then stands still for 80 ms at most
# where two groups take turns, and the copies come a few times a second.
LONGEST_BLOCK = 8

_IS_PREFILL = attrgetter("is_prefill_chunk")


class Rotation:
    """Whose turn it is among decodes. Stateful fields: when each last ran, and since when."""

    def __init__(self) -> None:
        self._steps = 0
        self._last_run: dict[str, int] = {}
        self._began: dict[str, int] = {}

    def choose(self, ready: Sequence[Any], cap: int) -> set[str]:
        """Ids of the `cap` decodes that run in the next step; the others are to be held.

        Args:
            ready: decodes that would run, more than `cap` of them.
            cap: at least 0.
        """
        self._steps = step = self._steps + 1
        if cap <= 0:
            return set()
        block = max(1, LONGEST_BLOCK // (-(-len(ready) // cap) - 1))
        names = [request.request_id for request in ready]
        last = {name: self._last_run.get(name, step - 1) for name in names}
        began = self._began
        going = [name for name in names if step - began.get(name, -block) < block]
        going.sort(key=lambda name: -began[name])
        on = set(going)
        waiting = sorted((name for name in names if name not in on), key=last.__getitem__)
        overdue = sum(step - last[name] > LONGEST_BLOCK for name in waiting)
        stay = max(0, cap - overdue)
        chosen = (going[:stay] + waiting + going[stay:])[:cap]
        # One that is over its block begins another, if no other decode waits for its place.
        self._began = {name: began[name] if name in on else step for name in chosen}
        last.update(dict.fromkeys(chosen, step))
        self._last_run = last
        return set(chosen)


class Levers:
    """The levers of one scheduler.

    Args:
        scheduler: vLLM's.
        tally: of the same scheduler; it spares looking for its prompts.
        waiting: of the same scheduler; it knows whose KV would begin to come from elsewhere.
    """

    def __init__(
        self, scheduler: Any, tally: RunningBatch | None = None, waiting: Waiting | None = None
    ) -> None:
        self._scheduler = scheduler
        self._tally = tally
        self._queue = None if waiting is None else LoadQueue(scheduler, waiting)
        self._rotation = Rotation()
        self._before: list[tuple[str, int]] = []

    def apply(self, limits: StepLimits, ready_tokens: int | None = None) -> Levers:
        """Set up the scheduler for one `schedule()`, to be called inside `with`.

        Args:
            limits: of this step.
            ready_tokens: of the decodes that would run, if that is known; else counted.
        """
        self._put_back()  # whatever a step that was never run has left
        if limits is UNLIMITED:
            return self
        try:
            loads = [] if self._queue is None else self._queue.loads
            if not limits.run:
                self._pause(loads)
            elif limits.binding:
                self._bind(limits, ready_tokens, loads)
        except BaseException:
            self._put_back()
            raise
        return self

    def __enter__(self) -> None:
        """The limits hold."""

    def __exit__(self, *failure: object) -> None:
        """What was changed is as it was, but for the holds, which end with the step."""
        self._put_back()

    def _put_back(self) -> None:
        if self._queue is not None:
            self._queue.put_back()
        while self._before:
            name, value = self._before.pop()
            setattr(self._scheduler, name, value)

    def _set(self, name: str, value: int) -> None:
        self._before.append((name, getattr(self._scheduler, name)))
        setattr(self._scheduler, name, value)

    def _cap_tokens(self, tokens: int) -> None:
        self._set("max_num_scheduled_tokens", min(self._scheduler.max_num_scheduled_tokens, tokens))

    def _pause(self, loads: list[Any]) -> None:
        """No token runs. vLLM looks at its queue, for loads, only if a step has one to give."""
        if loads and self._queue is not None:
            for request in self._scheduler.running:
                self._hold(request)
            self._queue.show(loads)
        self._cap_tokens(1 if loads else 0)

    def _bind(self, limits: StepLimits, ready_tokens: int | None, loads: list[Any]) -> None:
        cap, tokens = limits.running_requests, limits.prefill_tokens
        enters = tokens != 0 and (cap is None or cap > len(self._scheduler.running))
        if cap is not None and (enters or not loads):
            self._set(*admission_limit(self._scheduler, max(0, cap)))
        if tokens == 0:
            self._hold_prefills()
            if not loads:
                self._set(*admission_limit(self._scheduler, 0))
        if limits.decode_requests is not None or ready_tokens is None:
            ready_tokens = self._hold_decodes(limits.decode_requests)
        if tokens:
            self._decodes_first()
            self._cap_tokens(ready_tokens + tokens)
        if loads and self._queue is not None:
            if enters:
                self._queue.show_first(loads)
                return
            self._queue.show(loads)
            if tokens == 0:
                # One more than the decodes take, or vLLM would not look at its queue.
                self._cap_tokens(ready_tokens + 1)

    def _hold(self, request: Any) -> None:
        """Leave a request out of the next step. vLLM counts the step up before it looks."""
        step: int = self._scheduler.current_step + 2
        request.next_decode_eligible_step = max(request.next_decode_eligible_step, step)

    def _hold_prefills(self) -> None:
        known = None if self._tally is None else self._tally.prefills
        for request in self._scheduler.running if known is None else known:
            if request.is_prefill_chunk:
                self._hold(request)

    def _decodes_first(self) -> None:
        """vLLM serves `running` in order: a prompt before a decode would eat its token."""
        running = self._scheduler.running
        known = None if self._tally is None else self._tally.prefills
        if known is None or running[len(running) - len(known) :] != known:
            running.sort(key=_IS_PREFILL)

    def _hold_decodes(self, cap: int | None) -> int:
        """Hold all but `cap` decodes. Returns the tokens of those that run."""
        next_step = self._scheduler.current_step + 1
        ready = [
            request
            for request in self._scheduler.running
            if not request.is_prefill_chunk and is_ready_decode(request, next_step)
        ]
        if cap is not None and cap < len(ready):
            chosen = self._rotation.choose(ready, cap)
            for request in ready:
                if request.request_id not in chosen:
                    self._hold(request)
            ready = [request for request in ready if request.request_id in chosen]
        if not self._scheduler.num_spec_tokens:
            return len(ready)
        return sum([max(0, decode_tokens(self._scheduler, request)) for request in ready])
