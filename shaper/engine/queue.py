"""Which waiting requests vLLM may look at in one step, and in which order.

A request whose KV comes from elsewhere costs no token and no place among the running while it is
loaded: its load begins when it would without a budget. vLLM looks at its queue in order and stops
at the first request that may not enter, so a step that lets no prompt in is shown a queue of loads
alone, and a step that lets some in is shown the loads first. Afterwards the queue is as vLLM would
have left it: in its order, without those that have left it, behind those that were preempted.
"""

from __future__ import annotations

from typing import Any

from shaper.engine.compat import keeps_order, may_enter
from shaper.engine.waiting import Waiting


class LoadQueue:
    """The queue of one scheduler. Stateful field: vLLM's own while another is shown.

    Args:
        scheduler: vLLM's.
        waiting: of the same scheduler, as it was read last.
    """

    def __init__(self, scheduler: Any, waiting: Waiting) -> None:
        self._scheduler = scheduler
        self._waiting = waiting
        self._own: tuple[Any, list[Any]] | None = None

    @property
    def loads(self) -> list[Any]:
        """Requests whose load would begin now."""
        found = self._waiting.loads
        if not found:
            return found
        return [each for each in found if _has_not_begun(self._scheduler, each)]

    def show(self, loads: list[Any]) -> None:
        """Loads alone."""
        self._replace(loads, loads)

    def show_first(self, loads: list[Any]) -> None:
        """Loads before all others, each once: one that finds no room would stop those behind."""
        own = self._scheduler.waiting
        new = [each for each in loads if not getattr(each, "shaper_shown_first", False)]
        if not new or not keeps_order(own):
            return
        for each in new:
            each.shaper_shown_first = True
        chosen = set(new)
        everyone = list(own)
        self._replace([*new, *(each for each in everyone if each not in chosen)], everyone)

    def _replace(self, shown: list[Any], among: list[Any]) -> None:
        own = self._scheduler.waiting
        here = set(own)
        other = type(own)()
        for request in shown:
            if request in here:
                other.add_request(request)
        self._own = own, [each for each in among if each in here]
        self._scheduler.waiting = other

    def put_back(self) -> None:
        """vLLM's own queue again."""
        if self._own is None:
            return
        (own, among), self._own = self._own, None
        left = self._scheduler.waiting
        self._scheduler.waiting = own
        still, known = set(left), set(among)
        own.remove_requests([each for each in among if each not in still])
        for request in reversed([each for each in left if each not in known]):
            own.prepend_request(request)


def _has_not_begun(scheduler: Any, request: Any) -> bool:
    return request.num_computed_tokens == 0 and may_enter(scheduler, request)
