"""Applies a step's limits to vLLM's scheduler, and puts everything back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

from shaper.core.types import StepLimits
from shaper.engine.compat import admissions_capped_at
from shaper.engine.load import is_ready_decode

_IS_PREFILL = attrgetter("is_prefill_chunk")


class Levers:
    """The levers of one scheduler. Remembers when each held decode last ran."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._last_run: dict[str, int] = {}

    def apply(self, limits: StepLimits, ready_decodes: int | None = None) -> ExitStack:
        """Set up the scheduler for one `schedule()`; leaving the stack puts it back.

        Args:
            limits: of this step.
            ready_decodes: how many decodes would run, if that is known; else counted.
        """
        with ExitStack() as stack:
            if not limits.run:
                stack.enter_context(self._tokens_capped_at(0))
            elif limits.binding:
                self._bind(limits, ready_decodes, stack)
            return stack.pop_all()

    def _bind(self, limits: StepLimits, ready_decodes: int | None, stack: ExitStack) -> None:
        if limits.decode_requests is None and ready_decodes is not None:
            decodes = ready_decodes
        else:
            decodes = self._hold_decodes(limits.decode_requests)
        if limits.prefill_tokens == 0:
            self._hold_prefills()
            stack.enter_context(admissions_capped_at(self._scheduler, 0))
        elif limits.prefill_tokens is not None:
            # vLLM serves `running` in order: a prompt before a decode would eat its token.
            self._scheduler.running.sort(key=_IS_PREFILL)
            each = 1 + self._scheduler.num_spec_tokens
            stack.enter_context(self._tokens_capped_at(decodes * each + limits.prefill_tokens))

    @contextmanager
    def _tokens_capped_at(self, tokens: int) -> Iterator[None]:
        scheduler = self._scheduler
        before = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = min(before, tokens)
        try:
            yield
        finally:
            scheduler.max_num_scheduled_tokens = before

    def _hold(self, request: Any) -> None:
        """Leave a request out of the next step. vLLM counts the step up before it looks."""
        step: int = self._scheduler.current_step + 2
        request.next_decode_eligible_step = max(request.next_decode_eligible_step, step)

    def _hold_prefills(self) -> None:
        for request in self._scheduler.running:
            if request.is_prefill_chunk:
                self._hold(request)

    def _hold_decodes(self, cap: int | None) -> int:
        """Hold all but `cap` decodes, those that ran last first. Returns how many run."""
        next_step = self._scheduler.current_step + 1
        ready = [
            request
            for request in self._scheduler.running
            if not request.is_prefill_chunk and is_ready_decode(request, next_step)
        ]
        if cap is None or cap >= len(ready):
            self._last_run.clear()
            return len(ready)
        ready.sort(key=lambda request: self._last_run.get(request.request_id, 0))
        for request in ready[cap:]:
            self._hold(request)
        self._last_run = {
            request.request_id: next_step
            if position < cap
            else self._last_run.get(request.request_id, 0)
            for position, request in enumerate(ready)
        }
        return cap
