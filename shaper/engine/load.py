"""Reads what vLLM's scheduler would run next, and what it did schedule."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from shaper.core.types import EngineLoad, PrefillDemand, StepBatch
from shaper.engine.compat import admission_cap, waiting_requests

# More prompts than this don't fit a step of 8,192 tokens at the lengths people send.
_MAX_PREFILLS = 64


def is_ready_decode(request: Any, next_step: int) -> bool:
    """Whether a running request that is past its prompt would get its next token now."""
    if next_step < request.next_decode_eligible_step:
        return False
    placeholders = request.num_output_placeholders
    # vLLM's own test: the steps in flight already reach max_tokens.
    last = request.num_prompt_tokens + request.max_tokens
    return not (placeholders > 0 and request.num_computed_tokens + 2 - placeholders >= last)


def engine_load(scheduler: Any, previous: Set[str]) -> EngineLoad:
    """The step that vLLM would run if nothing held it back.

    Args:
        scheduler: vLLM's; it is not changed.
        previous: ids of the requests in the last step, to tell which ones return.
    """
    next_step = scheduler.current_step + 1
    decode_tokens_each = 1 + scheduler.num_spec_tokens
    decodes = contexts = returned = 0
    prefills: list[PrefillDemand] = []
    # `is_ready_decode`, written out: this loop runs over all requests at every step.
    for request in scheduler.running:
        if next_step < request.next_decode_eligible_step:
            continue
        computed = request.num_computed_tokens
        if request.is_prefill_chunk:
            prefills.append(PrefillDemand(max(1, request.num_tokens - computed), computed))
            continue
        placeholders = request.num_output_placeholders
        if placeholders and computed + 2 - placeholders >= (
            request.num_prompt_tokens + request.max_tokens
        ):
            continue
        decodes += 1
        contexts += computed
        if request.request_id not in previous:
            returned += 1
    tokens = decodes * decode_tokens_each
    budget = scheduler.max_num_scheduled_tokens
    _add_waiting(scheduler, prefills, budget - tokens)
    config = scheduler.scheduler_config
    return EngineLoad(
        decode_requests=decodes,
        decode_tokens=tokens,
        decode_context_tokens=contexts + tokens,
        prefills=tuple(prefills),
        token_budget=budget,
        request_chunk_tokens=config.long_prefill_token_threshold,
        splittable=config.enable_chunked_prefill,
        returned_requests=returned,
    )


def _demand(request: Any) -> PrefillDemand:
    computed = request.num_computed_tokens
    return PrefillDemand(max(1, request.num_tokens - computed), computed)


def _add_waiting(scheduler: Any, prefills: list[PrefillDemand], tokens: int) -> None:
    tokens -= sum(demand.remaining_tokens for demand in prefills)
    slots = min(admission_cap(scheduler) - len(scheduler.running), _MAX_PREFILLS)
    for request in waiting_requests(scheduler):
        if tokens <= 0 or slots <= 0:
            return
        # Waiting for remote KV, a grammar or a stream's next part: not for us.
        if request.status.name not in ("WAITING", "PREEMPTED"):
            continue
        demand = _demand(request)
        prefills.append(demand)
        tokens -= demand.remaining_tokens
        slots -= 1


def launched_batch(
    scheduler: Any, output: Any, previous: Set[str], expected: StepBatch | None = None
) -> StepBatch:
    """What `schedule()` put into the step it just returned.

    Args:
        scheduler: vLLM's.
        output: what it returned.
        previous: as in `engine_load`.
        expected: what the limits should have given; it is taken if counts and tokens
            agree, which spares the loop over all requests.
    """
    if (
        expected is not None
        and output.total_num_scheduled_tokens == expected.tokens
        and len(output.num_scheduled_tokens) == expected.requests
    ):
        return expected
    requests = scheduler.requests
    decode_most = 1 + scheduler.num_spec_tokens
    decodes = decode_tokens = decode_contexts = returned = 0
    prefills = tokens = contexts = products = squares = 0
    for request_id, count in output.num_scheduled_tokens.items():
        request = requests[request_id]
        # schedule() has already advanced this to the end of the step.
        context = request.num_computed_tokens
        if count > decode_most or context - count < request.num_prompt_tokens:
            prefills += 1
            tokens += count
            contexts += context
            products += count * context
            squares += count * count
        else:
            decodes += 1
            decode_tokens += count
            decode_contexts += context
            returned += request_id not in previous
    return StepBatch(
        decode_requests=decodes,
        decode_tokens=decode_tokens,
        decode_context_tokens=decode_contexts,
        prefill_requests=prefills,
        prefill_tokens=tokens,
        prefill_context_tokens=contexts,
        prefill_token_context_product=products,
        prefill_squared_tokens=squares,
        returned_requests=returned,
    )
