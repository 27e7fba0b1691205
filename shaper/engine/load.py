"""Reads what vLLM's scheduler would run next, and what it did schedule."""

from __future__ import annotations

from collections.abc import Set
from itertools import islice
from typing import Any

from shaper.core.types import EngineLoad, PrefillDemand, StepBatch
from shaper.engine.compat import (
    admission_cap,
    copies_returned_requests,
    may_enter,
    waiting_requests,
)
from shaper.engine.tally import RunningTally, full_count

# More prompts than this don't fit a step of 8,192 tokens at the lengths people send.
_MAX_PREFILLS = 64
# A long queue of requests that can't enter yet must not be looked through at every step.
_MAX_LOOKED_AT = 256
EMPTY_STEP = StepBatch()


def engine_load(
    scheduler: Any, previous: Set[str], tally: RunningTally | None = None
) -> EngineLoad:
    """The step that vLLM would run if nothing held it back.

    Args:
        scheduler: vLLM's; it is not changed.
        previous: ids of the requests in the last step, to tell which ones return.
        tally: keeps the counts of running requests; else all of them are counted.
    """
    counts = full_count(scheduler, previous) if tally is None else tally.read(previous)
    decodes = counts.decodes
    tokens = decodes * (1 + scheduler.num_spec_tokens)
    budget = scheduler.max_num_scheduled_tokens
    prefills = [_demand(request) for request in counts.prefills] if counts.prefills else []
    arrival = None
    head = next(waiting_requests(scheduler), None)
    if head is not None:
        _add_waiting(scheduler, prefills, budget - tokens)
        # Stamped by the shaped scheduler: vLLM's own `arrival_time` is of the wall clock.
        arrival = getattr(head, "shaper_arrival_seconds", None)
    config = scheduler.scheduler_config
    returned = counts.returned
    # By position, in the order of its fields: with names the call takes half as long again.
    return EngineLoad(
        decodes,
        tokens,
        counts.context_tokens + tokens,
        tuple(prefills),
        budget,
        config.long_prefill_token_threshold,
        config.enable_chunked_prefill,
        returned if returned and copies_returned_requests(scheduler) else 0,
        len(scheduler.running),
        len(counts.prefills),
        len(scheduler.waiting),
        arrival,
    )


def has_everyone(load: EngineLoad) -> bool:
    """Whether no request is left out of it, as one that is not ready is."""
    ready = load.decode_requests + len(load.prefills)
    return ready == load.running_requests + load.waiting_requests


def _demand(request: Any) -> PrefillDemand:
    computed = request.num_computed_tokens
    left = request.num_tokens - computed
    return PrefillDemand(left if left > 1 else 1, computed)


def _add_waiting(scheduler: Any, prefills: list[PrefillDemand], tokens: int) -> None:
    tokens -= sum([demand.remaining_tokens for demand in prefills])
    slots = min(admission_cap(scheduler) - len(scheduler.running), _MAX_PREFILLS)
    for request in islice(waiting_requests(scheduler), _MAX_LOOKED_AT):
        if tokens <= 0 or slots <= 0:
            return
        if not may_enter(scheduler, request):
            continue
        demand = _demand(request)
        prefills.append(demand)
        tokens -= demand.remaining_tokens
        slots -= 1


def launched_batch(
    scheduler: Any,
    output: Any,
    previous: Set[str],
    expected: StepBatch | None = None,
    tally: RunningTally | None = None,
) -> StepBatch:
    """What `schedule()` put into the step it just returned.

    Args:
        scheduler: vLLM's.
        output: what it returned.
        previous: as in `engine_load`.
        expected: what the limits should have given; it is taken if counts and tokens
            agree, which spares the loop over all requests.
        tally: is told.
    """
    batch = _launched(scheduler, output, previous, expected)
    if tally is not None:
        tally.launched(batch)
    return batch


def _launched(
    scheduler: Any, output: Any, previous: Set[str], expected: StepBatch | None
) -> StepBatch:
    if not output.total_num_scheduled_tokens:
        return EMPTY_STEP
    if (
        expected is not None
        and output.total_num_scheduled_tokens == expected.tokens
        and len(output.num_scheduled_tokens) == expected.requests
    ):
        return expected
    requests = scheduler.requests
    copies = copies_returned_requests(scheduler)
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
            returned += copies and request_id not in previous
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
