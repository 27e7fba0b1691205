"""Follows requests from step to step and says what each step computes.

Reads vLLM's `SchedulerOutput` by attribute and imports no vLLM, so that the
rules can be tested on plain values. A request samples a token in a step that
reaches the end of what is known of it:

    num_computed + scheduled >= known = prompt + outputs (those in flight included)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from shaper.core.types import StepBatch


@dataclass(slots=True)
class TrackedRequest:
    """What the emulated GPU keeps of a request while it lives."""

    request_id: str
    prompt_token_ids: list[int] | None
    prompt_length: int
    sampling_params: Any
    last_step: int = -1
    prompt_logprobs_due: bool = False
    text_offset: int | None = None
    natural_length: int | None = None


class TrackedStep(NamedTuple):
    """One step: its work, its requests in the scheduler's order, and which of them sample.

    `outputs[i]` is the index of the output token that request `i` samples in
    this step, or None where the step ends inside its prompt.
    """

    batch: StepBatch
    requests: list[TrackedRequest]
    outputs: list[int | None]


class RequestTracker:
    """Turns scheduler outputs into `TrackedStep`s. Holds state for live requests only."""

    def __init__(self) -> None:
        self._requests: dict[str, TrackedRequest] = {}
        self._step = 0

    def __len__(self) -> int:
        return len(self._requests)

    def observe(self, scheduled: Any) -> TrackedStep | None:
        """Takes one `SchedulerOutput`, in order. None for a step with no tokens.

        A step without tokens still counts as one: a GPU worker drops every
        request from its batch then, so they come back as returned ones.
        """
        for request_id in scheduled.finished_req_ids:
            self._requests.pop(request_id, None)
        previous_step = self._step
        self._step += 1
        if not scheduled.total_num_scheduled_tokens:
            return None
        step = _StepBuilder(scheduled.num_scheduled_tokens)
        for new in scheduled.scheduled_new_reqs:
            request = self._start(new)
            known = len(getattr(new, "prefill_token_ids", None) or ()) or request.prompt_length
            step.add(request, new.num_computed_tokens, known, returned=False)
            request.last_step = self._step
        cached = scheduled.scheduled_cached_reqs
        for request_id, computed, outputs in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            request = self._requests[request_id]
            known = request.prompt_length + outputs
            step.add(request, computed, known, returned=request.last_step != previous_step)
            request.last_step = self._step
        return step.finish(scheduled.num_scheduled_tokens)

    def _start(self, new: Any) -> TrackedRequest:
        tokens = new.prompt_token_ids
        embeds = getattr(new, "prompt_embeds", None)
        length = len(tokens) if tokens is not None else (0 if embeds is None else len(embeds))
        parameters = new.sampling_params
        wants_prompt = getattr(parameters, "prompt_logprobs", None) is not None
        known = self._requests.get(new.req_id)
        request = TrackedRequest(
            request_id=new.req_id,
            prompt_token_ids=tokens,
            prompt_length=length,
            sampling_params=parameters,
            # A preempted request may come back as new; its prompt was answered for then.
            prompt_logprobs_due=wants_prompt if known is None else known.prompt_logprobs_due,
        )
        self._requests[new.req_id] = request
        return request


class _StepBuilder:
    """Sums the work of one step, request by request."""

    def __init__(self, scheduled_tokens: dict[str, int]) -> None:
        self._scheduled_tokens = scheduled_tokens
        self._rows: dict[str, tuple[TrackedRequest, int | None]] = {}
        self._decodes = self._decode_tokens = self._decode_context = self._returned = 0
        self._prefills = self._prefill_tokens = self._prefill_context = 0
        self._product = self._squares = 0

    def add(self, request: TrackedRequest, computed: int, known: int, *, returned: bool) -> None:
        tokens = self._scheduled_tokens[request.request_id]
        context = computed + tokens
        if computed >= known - 1:
            self._decodes += 1
            self._decode_tokens += tokens
            self._decode_context += context
            self._returned += returned
        else:
            self._prefills += 1
            self._prefill_tokens += tokens
            self._prefill_context += context
            self._product += tokens * context
            self._squares += tokens * tokens
        output = known - request.prompt_length if context >= known else None
        self._rows[request.request_id] = (request, output)

    def finish(self, order: dict[str, int]) -> TrackedStep:
        rows = [self._rows[request_id] for request_id in order]
        batch = StepBatch(
            decode_requests=self._decodes,
            decode_tokens=self._decode_tokens,
            decode_context_tokens=self._decode_context,
            prefill_requests=self._prefills,
            prefill_tokens=self._prefill_tokens,
            prefill_context_tokens=self._prefill_context,
            prefill_token_context_product=self._product,
            prefill_squared_tokens=self._squares,
            returned_requests=self._returned,
        )
        return TrackedStep(batch, [row[0] for row in rows], [row[1] for row in rows])
