"""vLLM's asynchronous scheduler as far as the shaper sees it, for runs without vLLM."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class _Status(enum.Enum):
    WAITING = 1
    RUNNING = 2


@dataclass(slots=True, eq=False)
class StubRequest:
    """The fields of vLLM's request that the shaper reads."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    shaper_arrival_seconds: float
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    next_decode_eligible_step: int = 0
    is_prefill_chunk: bool = False
    status: _Status = _Status.WAITING

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StubOutput:
    """A step's tokens by request, and their sum."""

    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int


@dataclass(slots=True)
class StubScheduler:
    """vLLM's asynchronous scheduler as far as the shaper sees it: no KV cache, no tokens."""

    running: list[StubRequest] = field(default_factory=list)
    waiting: list[StubRequest] = field(default_factory=list)
    requests: dict[str, StubRequest] = field(default_factory=dict)
    current_step: int = 0
    num_spec_tokens: int = 0
    max_num_scheduled_tokens: int = 8192
    max_num_active_reqs: int = 256
    max_num_running_reqs: int = 256
    scheduler_config: Any = field(
        default_factory=lambda: SimpleNamespace(
            long_prefill_token_threshold=0, enable_chunked_prefill=True
        )
    )

    def add(self, request: StubRequest) -> None:
        """A request arrives."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request: StubRequest) -> None:
        """Its client hangs up."""
        del self.requests[request.request_id]
        (self.running if request in self.running else self.waiting).remove(request)

    def schedule(self) -> StubOutput:
        """The next step: running requests first, then waiting ones, while tokens last."""
        self.current_step += 1
        budget = self.max_num_scheduled_tokens
        scheduled: dict[str, int] = {}
        for request in self.running:
            budget -= self._take(request, budget, scheduled)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_active_reqs:
            request = self.waiting.pop(0)
            request.status = _Status.RUNNING
            self.running.append(request)
            budget -= self._take(request, budget, scheduled)
        return StubOutput(scheduled, sum(scheduled.values()))

    def _take(self, request: StubRequest, budget: int, scheduled: dict[str, int]) -> int:
        computed, placeholders = request.num_computed_tokens, request.num_output_placeholders
        last = request.num_prompt_tokens + request.max_tokens
        if placeholders and computed + 2 - placeholders >= last:
            return 0
        if self.current_step < request.next_decode_eligible_step:
            return 0
        tokens = min(request.num_tokens + placeholders - computed, budget)
        if tokens <= 0:
            return 0
        scheduled[request.request_id] = tokens
        request.num_computed_tokens = computed = computed + tokens
        request.is_prefill_chunk = computed < request.num_tokens + placeholders
        if not request.is_prefill_chunk:
            request.num_output_placeholders += 1
        return tokens

    def update(self, output: StubOutput) -> None:
        """A step is back: each request that was past its prompt has one more token."""
        for name in output.num_scheduled_tokens:
            request = self.requests.get(name)
            if request is None or not request.num_output_placeholders:
                continue
            request.num_output_placeholders -= 1
            request.num_tokens += 1
            if request.num_tokens - request.num_prompt_tokens >= request.max_tokens:
                del self.requests[name]
                self.running.remove(request)
