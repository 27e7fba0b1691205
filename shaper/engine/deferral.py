"""Flex requests that wait in the engine, outside vLLM's waiting queue.

Law, at each `schedule()`, for requests in the order of their arrival:

    open, shaped    enter, while at most `MAX_LET_IN` of them have not started
    shaped          but not while an interactive prompt waits: that goes first
    defer, shed     none enters
    any of them     the oldest enters alone once waited / bound >= pressure (it ages),
                    and at its bound it runs or is refused

vLLM adds and frees every request as it would; a deferred one is only taken out of its
waiting queue, so aborts, duplicate ids, connectors and its own book-keeping find it where
they look. One that was let in and has not started is taken back under the same law.
Requests that run or were preempted are left alone. What has deferred requests has work:
the engine core then asks again every millisecond, as it does for vLLM's own held requests.

The boundary: nothing raises out of here. After a failure, and whenever the shaper is off,
in shadow, failed or silent, all deferred requests are vLLM's again at once.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from shaper.core.supervise.status import Admissibility, AdmissionState
from shaper.ipc.flex import REFUSED, RELEASED, STALE_SECONDS, FlexQueue, ShapingState, is_flex

logger = logging.getLogger(__name__)

# Enough to fill a step of 8,192 tokens with prompts as people send them; few enough that
# an interactive prompt which arrives next does not wait behind them.
MAX_LET_IN = 8
RETRY_SECONDS = 5.0
_LOG_AGAIN_SECONDS = 60.0
# Not started. Not one of them: preempted, or waiting for remote KV or a stream's next part.
_WAITING = frozenset({"WAITING", "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", "WAITING_FOR_FSM"})


@dataclass(slots=True)
class _Flex:
    """A flex request that has not started."""

    request: Any
    arrived_seconds: float
    exempt: bool = False
    """It was let in by its age or at its bound: it is not taken back."""
    counted: bool = False
    """As deferred; it may be taken back several times before it starts."""
    let_in_for: str | None = None


@dataclass(slots=True)
class _Counts:
    deferrals: int = 0
    released: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RELEASED, 0))
    refused: int = 0
    errors: int = 0


def _waits(request: Any) -> bool:
    return request.status.name in _WAITING


def _streams(request: Any) -> bool:
    parameters = request.sampling_params
    return parameters is not None and parameters.output_kind.name == "DELTA"


class Deferral:
    """The deferred requests of one scheduler. One thread calls; any may read `queue`.

    Args:
        scheduler: vLLM's.
        shaping_state: asked at each call.
    """

    def __init__(self, scheduler: Any, shaping_state: ShapingState) -> None:
        self._scheduler = scheduler
        self._shaping_state = shaping_state
        self._deferred: OrderedDict[str, _Flex] = OrderedDict()
        self._let_in: OrderedDict[str, _Flex] = OrderedDict()
        self._prompts: deque[tuple[Any, float]] = deque()
        self._counts = _Counts()
        self._failed_seconds = self._logged_seconds = -math.inf
        self.queue = FlexQueue()

    def __len__(self) -> int:
        """Requests that are deferred now."""
        return len(self._deferred)

    # --- the scheduler's calls

    def arrived(self, request: Any) -> None:
        """vLLM has just taken this request into its waiting queue."""
        self._guarded(lambda: self._arrived(request))

    def before_schedule(self) -> None:
        """Let in and take back, as the state says."""
        if self._deferred or self._let_in or self._prompts:
            self._guarded(self._before_schedule)

    def finished(self, request_ids: Iterable[str] | None) -> None:
        """vLLM has finished these requests; None: all."""
        if self._deferred:
            self._guarded(lambda: self._finished(request_ids))

    def refuse(self, outputs: dict[int, Any]) -> None:
        """Finish the requests that are to be refused now, and tell their clients.

        Args:
            outputs: what `update_from_output` returns, by client; they are added to it.
        """
        if self._deferred:
            self._guarded(lambda: self._refuse(outputs))

    # --- what they do

    def _admissibility(self, now: float) -> Admissibility | None:
        """What may enter; None where nothing is to be deferred."""
        shaping_state = self._shaping_state
        if not shaping_state.shaping or now - self._failed_seconds < RETRY_SECONDS:
            return None
        standing = shaping_state.standing
        if standing is None or now - standing.at_seconds > STALE_SECONDS:
            return None
        return standing.admissibility

    def _arrived(self, request: Any) -> None:
        now = self._shaping_state.clock()
        found = self._admissibility(now)
        # A further part of a session is no new request.
        if found is None or self._scheduler.requests.get(request.request_id) is not request:
            return
        if request.resumable or not is_flex(request):
            self._prompts.append((request, now))
        elif found.state is AdmissionState.OPEN and not self._deferred:
            self._let_in[request.request_id] = _Flex(request, now)
        else:
            self._defer(_Flex(request, now))
        self._publish()

    def _defer(self, flex: _Flex) -> None:
        waiting, request = self._scheduler.waiting, flex.request
        # Ours before it is no longer vLLM's: a failure in between loses nothing.
        self._deferred[request.request_id] = flex
        if isinstance(waiting, deque) and waiting and waiting[-1] is request:
            waiting.pop()
        elif any(each is request for each in waiting):
            waiting.remove_request(request)
        else:  # vLLM holds it back in a queue of its own
            del self._deferred[request.request_id]
            return
        self._count(flex)

    def _count(self, flex: _Flex) -> None:
        self._counts.deferrals += not flex.counted
        flex.counted = True

    def _finished(self, request_ids: Iterable[str] | None) -> None:
        for request_id in list(self._deferred) if request_ids is None else request_ids:
            self._deferred.pop(request_id, None)
        self._publish()

    def _before_schedule(self) -> None:
        now = self._shaping_state.clock()
        while self._prompts and not _waits(self._prompts[0][0]):
            self._prompts.popleft()
        self._forget_started()
        found = self._admissibility(now)
        if found is None:
            self._release_all()
        else:
            self._follow(found, now)
        self._publish()

    def _forget_started(self) -> None:
        """A long queue starts from its front; a short one is looked at as a whole."""
        short = len(self._let_in) <= 2 * MAX_LET_IN
        for request_id, flex in list(islice(self._let_in.items(), 2 * MAX_LET_IN)):
            if not _waits(flex.request):
                del self._let_in[request_id]
                if flex.let_in_for is not None:
                    self._counts.released[flex.let_in_for] += 1
            elif not short:
                break

    def _follow(self, found: Admissibility, now: float) -> None:
        state = found.state
        self._release_overdue(now)
        if state is AdmissionState.OPEN or (state is AdmissionState.SHAPED and not self._prompts):
            while self._deferred and len(self._let_in) < MAX_LET_IN:
                self._release(next(iter(self._deferred)), "room")
            return
        self._take_back()
        if self._deferred and not any(flex.exempt for flex in self._let_in.values()):
            request_id, oldest = next(iter(self._deferred.items()))
            waited_ratio = (
                now - oldest.arrived_seconds
            ) / self._shaping_state.flex.max_wait_seconds
            if found.pressure_ratio <= waited_ratio < 1.0:
                oldest.exempt = True
                self._release(request_id, "aged")

    def _overdue(self, now: float) -> list[str]:
        bound = self._shaping_state.flex.max_wait_seconds
        found = []
        for request_id, flex in self._deferred.items():
            if now - flex.arrived_seconds < bound:
                break
            found.append(request_id)
        return found

    def _release_overdue(self, now: float) -> None:
        if self._shaping_state.flex.refuse_on_timeout:
            return
        for request_id in self._overdue(now):
            self._deferred[request_id].exempt = True
            self._release(request_id, "timeout")

    def _take_back(self) -> None:
        """Those that were let in and have not started wait here again, in their order."""
        back = [
            (request_id, flex)
            for request_id, flex in self._let_in.items()
            if not flex.exempt and _waits(flex.request)
        ]
        if not back:
            return
        waiting = self._scheduler.waiting
        here = {id(request) for request in waiting}
        back = [(name, flex) for name, flex in back if id(flex.request) in here]
        for request_id, flex in reversed(back):
            self._deferred[request_id] = flex
            self._deferred.move_to_end(request_id, last=False)
            del self._let_in[request_id]
            self._count(flex)
        waiting.remove_requests([flex.request for _, flex in back])

    def _release(self, request_id: str, why: str) -> None:
        flex = self._deferred[request_id]
        self._scheduler.waiting.add_request(flex.request)
        del self._deferred[request_id]
        self._let_in[request_id] = flex
        flex.let_in_for = why

    def _release_all(self) -> None:
        for request_id in list(self._deferred):
            self._release(request_id, "off")

    def _refuse(self, outputs: dict[int, Any]) -> None:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.request import RequestStatus

        now = self._shaping_state.clock()
        if not self._shaping_state.flex.refuse_on_timeout or self._admissibility(now) is None:
            return
        for request_id in self._overdue(now):
            request = self._deferred[request_id].request
            reason, status = FinishReason.ABORT, RequestStatus.FINISHED_ABORTED
            if _streams(request):
                # vLLM shows a stream's client nothing of an abort before its first token.
                reason, status = FinishReason.ERROR, RequestStatus.FINISHED_ERROR
            # Made before anything is finished: a client that waits must hear of it.
            answer = EngineCoreOutput(
                request_id=request_id,
                new_token_ids=[],
                finish_reason=reason,
                stop_reason=REFUSED,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            self._scheduler.finish_requests(request_id, status)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(answer)
            self._counts.refused += 1
        self._publish()

    def _publish(self) -> None:
        counts = self._counts
        oldest = next(iter(self._deferred.values()), None)
        self.queue = FlexQueue(
            deferred_requests=len(self._deferred),
            oldest_deferred_seconds=None if oldest is None else oldest.arrived_seconds,
            waiting_since_seconds=self._prompts[0][1] if self._prompts else None,
            deferrals=counts.deferrals,
            released=tuple(counts.released.values()),
            refused=counts.refused,
            errors=counts.errors,
        )

    # --- the boundary

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        # Whatever is wrong here, every request is vLLM's again.
        except Exception:
            now = self._shaping_state.clock()
            self._failed_seconds = now
            self._counts.errors += 1
            if now - self._logged_seconds > _LOG_AGAIN_SECONDS:
                self._logged_seconds = now
                logger.exception("deferral failed; flex requests run as they come")
            try:
                self._give_back()
            except Exception:
                logger.exception("%d flex requests could not be given back", len(self._deferred))

    def _give_back(self) -> None:
        """Like `_release_all`, whatever state a failure has left."""
        waiting = self._scheduler.waiting
        here = {id(request) for request in waiting}
        for request_id, flex in list(self._deferred.items()):
            if _waits(flex.request) and id(flex.request) not in here:
                waiting.add_request(flex.request)
                self._counts.released["off"] += 1
            del self._deferred[request_id]
        self._publish()
