"""Counts of the running requests, kept from step to step instead of taken at each.

Law. With `steps` the launched steps that held every counted decode, and `offset` a
decode's computed tokens when it was counted, less the steps at that time:

    context of all decodes = sum of offsets + decodes * steps

A step that ran as it was counted leaves the sum as it is. What changed in `running` is
found by comparing it with a copy (one comparison of pointers per request, in C), and only
those requests are looked at; so are prompts, and decodes that have reached their last
token. Any other step (held decodes, one that vLLM scheduled otherwise, one that was not
seen) makes the next count a full one, and so does every `CHECK_EVERY`th: where the two
differ the kept counts are wrong, which is counted, logged once, and repaired.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from typing import Any, NamedTuple

from shaper.core.types import StepBatch
from shaper.engine.compat import one_token_each, sampled_each

logger = logging.getLogger(__name__)

# A full count of 1,024 requests takes about 200 us, a kept one 10: one in 256 is nothing,
# and an error would stand for a few seconds at most.
CHECK_EVERY = 256


class Counts(NamedTuple):
    """Running requests that the next step would hold. `prefills` are vLLM's requests."""

    decodes: int
    context_tokens: int
    """Tokens that the decodes have computed."""
    returned: int
    """Decodes that were not in the last step."""
    prefills: tuple[Any, ...]
    tokens: int
    """Of the decodes in the next step: one each, and their drafts."""


def decode_tokens(scheduler: Any, request: Any) -> int:
    """Tokens of a decode in the next step: vLLM's own formula.

    A request holds the drafts that it will run with, placeholders where they come later.
    """
    computed = request.num_computed_tokens
    tokens = request.num_tokens_with_spec + request.num_output_placeholders - computed
    return int(min(tokens, scheduler.max_model_len - computed - sampled_each(scheduler)))


def is_ready_decode(request: Any, next_step: int) -> bool:
    """Whether a running request that is past its prompt would get its next token now."""
    if next_step < request.next_decode_eligible_step:
        return False
    placeholders = request.num_output_placeholders
    # vLLM's own test: the steps in flight already reach max_tokens.
    last = request.num_prompt_tokens + request.max_tokens
    return not (placeholders > 0 and request.num_computed_tokens + 2 - placeholders >= last)


def full_count(scheduler: Any, previous: Set[str]) -> Counts:
    """The counts, from every running request.

    Args:
        scheduler: vLLM's.
        previous: ids of the requests in the last step.
    """
    next_step = scheduler.current_step + 1
    decodes = contexts = returned = drafted = 0
    prefills = []
    drafts = scheduler.num_spec_tokens > 0
    # `is_ready_decode`, written out: this loop runs over all requests.
    for request in scheduler.running:
        if next_step < request.next_decode_eligible_step:
            continue
        if request.is_prefill_chunk:
            prefills.append(request)
            continue
        computed = request.num_computed_tokens
        placeholders = request.num_output_placeholders
        if placeholders and computed + 2 - placeholders >= (
            request.num_prompt_tokens + request.max_tokens
        ):
            continue
        if drafts:
            tokens = decode_tokens(scheduler, request)
            if tokens <= 0:
                continue
            drafted += tokens
        decodes += 1
        contexts += computed
        if request.request_id not in previous:
            returned += 1
    return Counts(decodes, contexts, returned, tuple(prefills), drafted if drafts else decodes)


class RunningBatch:
    """The counts of one scheduler.

    Each step: `read` before vLLM schedules, `launched` after. Stateful fields: which
    requests are decodes, prompts or neither, and the sums over the decodes.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        # With drafts, diffusion or pipeline stages a step doesn't add one token to each.
        self._regular = one_token_each(scheduler)
        self.mismatches = 0
        """Times that the kept counts were found wrong."""
        self._reads = 0
        self._forget()

    def _forget(self) -> None:
        self._kept = self._as_counted = False
        self._read_step = -1
        self._running: list[Any] = []
        self._members: set[Any] = set()
        self._offsets: dict[Any, tuple[int, int]] = {}  # with the key of `_ends`
        self._offset_sum = 0
        self._steps = 0
        self._prefills: list[Any] = []
        # Decodes by the number of steps at which all their tokens are scheduled; those
        # that are there; and running requests that are neither decodes nor prompts now.
        self._ends: dict[int, set[Any]] = {}
        self._ending: set[Any] = set()
        self._others: set[Any] = set()
        self._last = Counts(0, 0, 0, (), 0)

    @property
    def prefills(self) -> list[Any] | None:
        """Running requests that are in their prompt, held ones too; None if not known."""
        return self._prefills if self._kept else None

    def read(self, previous: Set[str]) -> Counts:
        """What the next step would hold. Arguments: see `full_count`."""
        scheduler = self._scheduler
        seen = self._as_counted and self._read_step == scheduler.current_step - 1
        self._read_step, self._as_counted = scheduler.current_step, False
        if not seen or not self._regular:
            if self._kept:
                self._forget()
                self._read_step = scheduler.current_step
            self._last = full_count(scheduler, previous)
        elif not self._kept:
            # Kept from the second such step on: where every step is held, nothing is.
            self._last = self._begin(previous)
        else:
            self._last = self._follow(previous)
            self._reads += 1
            if self._reads % CHECK_EVERY == 0:
                self._check(previous)
        return self._last

    def launched(self, batch: StepBatch) -> None:
        """What vLLM scheduled; before an empty step `read` may not have been called."""
        before = self._scheduler.current_step - 1
        if not batch.requests and self._as_counted and self._read_step == before - 1:
            self._read_step = before  # nothing ran: what was counted holds
            return
        if self._read_step != before:
            return  # `read` was not called since the step before
        decodes = self._last.decodes
        if not batch.requests:
            self._as_counted = True
            return
        self._as_counted = batch.decode_requests == decodes == batch.decode_tokens
        if self._as_counted and self._kept and decodes:
            self._steps += 1
            if self._steps in self._ends:
                self._ending |= self._ends.pop(self._steps)

    def _begin(self, previous: Set[str]) -> Counts:
        self._forget()
        self._kept, self._read_step = True, self._scheduler.current_step
        self._reconcile()
        return self._follow(previous)

    def _check(self, previous: Set[str]) -> None:
        found = full_count(self._scheduler, previous)
        if found != self._last:
            if not self.mismatches:
                logger.warning("the running requests are %s, were counted as %s", found, self._last)
            self.mismatches += 1
            self._last = self._begin(previous)

    # --- from one step to the next

    def _follow(self, previous: Set[str]) -> Counts:
        if self._scheduler.running != self._running:
            self._reconcile()
        new = self._look_again() if self._prefills or self._others or self._ending else ()
        decodes = len(self._offsets)
        if not previous:
            returned = decodes
        elif new:
            returned = sum([each.request_id not in previous for each in new])
        else:
            returned = 0
        prefills: tuple[Any, ...] = ()
        if self._prefills:
            next_step = self._scheduler.current_step + 1
            prefills = tuple(
                [each for each in self._prefills if next_step >= each.next_decode_eligible_step]
            )
        contexts = self._offset_sum + decodes * self._steps
        return Counts(decodes, contexts, returned, prefills, decodes)

    def _reconcile(self) -> None:
        """Take over who runs."""
        running = self._scheduler.running
        members = set(running)
        for request in self._members - members:
            self._drop(request)
        self._take(running, members - self._members)
        self._running, self._members = list(running), members

    def _take(self, running: list[Any], added: set[Any]) -> None:
        """New requests; vLLM appends them, so they are found from the end."""
        left = len(added)
        prefills = []
        for request in reversed(running):
            if not left:
                break
            if request in added:
                left -= 1
                if request.is_prefill_chunk:
                    prefills.append(request)
                else:
                    self._others.add(request)
        self._prefills.extend(reversed(prefills))

    def _drop(self, request: Any) -> None:
        if request in self._offsets:
            self._uncount(request)
        elif request in self._others:
            self._others.discard(request)
        else:
            self._prefills.remove(request)

    def _uncount(self, request: Any) -> None:
        offset, end = self._offsets.pop(request)
        self._offset_sum -= offset
        self._ending.discard(request)
        same = self._ends.get(end)
        if same is not None:
            same.discard(request)
            if not same:
                del self._ends[end]

    def _look_again(self) -> list[Any]:
        """Sort requests whose kind may have changed. Returns those that are decodes now."""
        next_step = self._scheduler.current_step + 1
        if self._ending:
            for request in [each for each in self._ending if not is_ready_decode(each, next_step)]:
                self._uncount(request)
                self._others.add(request)
        if self._prefills:
            started = [each for each in self._prefills if not each.is_prefill_chunk]
            for request in started:
                self._prefills.remove(request)
            self._others.update(started)
        if not self._others:
            return []
        new = [each for each in self._others if is_ready_decode(each, next_step)]
        self._others.difference_update(new)
        self._count(new)
        return new

    def _count(self, requests: Iterable[Any]) -> None:
        for request in requests:
            offset = request.num_computed_tokens - self._steps
            end = request.num_prompt_tokens + request.max_tokens - 1 - offset
            self._offsets[request] = offset, end
            self._offset_sum += offset
            if end > self._steps:
                self._ends.setdefault(end, set()).add(request)
            else:
                self._ending.add(request)
