"""Reads what vLLM's scheduler would run next, and what it did schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set
from typing import Any

from shaper.core.types import EngineLoad, PrefillDemand, StepBatch, StepLimits
from shaper.engine.compat import (
    admission_cap,
    copies_returned_requests,
    waiting_requests,
)
from shaper.engine.compat_prompts import chunk_blocks, request_chunk_tokens
from shaper.engine.running_batch import RunningBatch, full_count
from shaper.engine.waiting import Waiting

# More prompts than this don't fit a step of 8,192 tokens at the lengths people send. Where
# they do, and all of them would be let in, the rest is counted as well: `whole_load`.
_MAX_PREFILLS = 64
# A long queue of requests that can't enter yet must not be looked through at every step.
_MAX_LOOKED_AT = 256
EMPTY_STEP = StepBatch()


def engine_load(
    scheduler: Any,
    previous: Set[str],
    tally: RunningBatch | None = None,
    waiting: Waiting | None = None,
) -> EngineLoad:
    """The step that vLLM would run if nothing held it back.

    Args:
        scheduler: vLLM's; it is not changed.
        previous: ids of the requests in the last step, to tell which ones return.
        tally: keeps the counts of running requests; else all of them are counted.
        waiting: knows what waiting prompts find in the caches; else one that knows nothing yet.
    """
    counts = full_count(scheduler, previous) if tally is None else tally.read(previous)
    decodes, tokens = counts.decodes, counts.tokens
    config = scheduler.scheduler_config
    budget = scheduler.max_num_scheduled_tokens
    prefills = [_demand(request) for request in counts.prefills] if counts.prefills else []
    arrival = None
    more = False
    most = request_chunk_tokens(scheduler) if config.long_prefill_token_threshold else 0
    head = next(waiting_requests(scheduler), None)
    if head is not None:
        known = waiting or Waiting(scheduler)
        more = _add_waiting(scheduler, prefills, budget - tokens, most, known, _MAX_PREFILLS)
        # Stamped by the shaped scheduler: vLLM's own `arrival_time` is of the wall clock.
        arrival = getattr(head, "shaper_arrival_seconds", None)
    elif waiting is not None:
        waiting.clear()
    returned = counts.returned
    # By position, in the order of its fields: with names the call takes half as long again.
    return EngineLoad(
        decodes,
        tokens,
        counts.context_tokens + tokens,
        tuple(prefills),
        budget,
        most,
        config.enable_chunked_prefill,
        returned if returned and copies_returned_requests(scheduler) else 0,
        len(scheduler.running),
        len(counts.prefills),
        len(scheduler.waiting),
        arrival,
        chunk_blocks(scheduler),
        more,
    )


def whole_load(scheduler: Any, load: EngineLoad, waiting: Waiting) -> EngineLoad:
    """The same with every prompt that the step has room for, however many they are."""
    prefills = list(load.prefills[: load.running_prefills])
    tokens = load.token_budget - load.decode_tokens
    _add_waiting(scheduler, prefills, tokens, load.request_chunk_tokens, waiting, math.inf)
    return dataclasses.replace(load, prefills=tuple(prefills), more_waiting=False)


def _expected(load: EngineLoad | None, limits: StepLimits | None) -> StepBatch | None:
    """The step that the limits should give, where that is known before."""
    if load is None or limits is None or not limits.run or limits.decode_requests is not None:
        return None
    return load.batch(limits.prefill_tokens)


def has_everyone(load: EngineLoad) -> bool:
    """Whether no request is left out of it, as one that is not ready is."""
    ready = load.decode_requests + len(load.prefills)
    return ready == load.running_requests + load.waiting_requests


def _demand(request: Any) -> PrefillDemand:
    computed = request.num_computed_tokens
    left = request.num_tokens - computed
    return PrefillDemand(left if left > 1 else 1, computed)


def _add_waiting(
    scheduler: Any,
    prefills: list[PrefillDemand],
    tokens: int,
    most: int,
    waiting: Waiting,
    left: float,
) -> bool:
    """Add the prompts that may enter, `left` at most. Returns whether some were left out."""
    for demand in prefills:
        tokens -= min(demand.remaining_tokens, most) if most else demand.remaining_tokens
    slots = admission_cap(scheduler) - len(scheduler.running)
    looks = left if left == math.inf else _MAX_LOOKED_AT
    full = False
    known = waiting.begin()
    answered = len(known)
    for index, request in enumerate(waiting_requests(scheduler)):
        full = full or tokens <= 0 or slots <= 0
        if full and not (waiting.connects and waiting.asks):
            return False
        if looks <= 0 or (left <= 0 and not full):
            return waiting.asks and not full
        looks -= 1
        found = known[index] if index < answered else waiting.demand(request)
        # Behind what fits the step only loads are of interest: unshaped, they would begin soon.
        if found is None or full:
            continue
        remaining = found.remaining_tokens
        if waiting.too_large(remaining):
            return False
        prefills.append(found)
        tokens -= min(remaining, most) if most else remaining
        slots -= 1
        left -= 1
    return False


def launched_batch(
    scheduler: Any,
    output: Any,
    previous: Set[str],
    load: EngineLoad | None = None,
    limits: StepLimits | None = None,
    tally: RunningBatch | None = None,
) -> StepBatch:
    """What `schedule()` put into the step it just returned.

    Args:
        scheduler: vLLM's.
        output: what it returned.
        previous: as in `engine_load`.
        load, limits: what was counted and allowed; the step that they should have given is
            taken if counts and tokens agree, which spares the loop over all requests.
        tally: gets the batch.
    """
    batch = _launched(scheduler, output, previous, _expected(load, limits))
    if tally is not None:
        tally.launched(batch)
    return batch


def _launched(
    scheduler: Any, output: Any, previous: Set[str], expected: StepBatch | None
) -> StepBatch:
    if not output.total_num_scheduled_tokens:
        return EMPTY_STEP
    requests = scheduler.requests
    if (
        expected is not None
        and output.total_num_scheduled_tokens == expected.tokens
        and len(output.num_scheduled_tokens) == expected.requests
        and (not expected.prefill_requests or _has_prefills(output, requests, expected))
    ):
        return expected
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


def _has_prefills(output: Any, requests: Any, expected: StepBatch) -> bool:
    """Whether the prompts of a step have the contexts that were expected of them.

    They are the last ones that vLLM has scheduled, if they are the ones that were planned.
    """
    counts = output.num_scheduled_tokens
    tokens = contexts = 0
    for request_id, _ in zip(reversed(counts), range(expected.prefill_requests), strict=False):
        tokens += counts[request_id]
        contexts += requests[request_id].num_computed_tokens
    return tokens == expected.prefill_tokens and contexts == expected.prefill_context_tokens
