"""The windowed-energy planner.

Objective: the most tokens in this step, subject to every window of the budget and to the
inter-token latency (ITL) target; inside them prompts wait as short as can be.

Law: a step fits when its predicted mean watts are at most what the ledger
leaves for a step of its length, with decodes going on after it. In order:

0. no request enters while more run than the sustained limit can serve at the ITL target
   (`policy/sustained.py`);
1. where only decodes are ready and their target leaves time: nothing, for `SLACK_SHARE` of
   the target if slack shall be spent, else for the cadence that the budget asks for. A
   decode step mostly reads weights, so its joules hardly depend on how many share it. Without
   a target they go on at once while no prompt waits, unless a group asks for the default
   decode interval (`DEFAULT_DECODE_INTERVAL`);
2. what the engine wants, if it fits: then nothing is limited;
3. all decodes and the largest efficient prefill chunk that fits; without an ITL target
   it takes at most `SOFT_STEP_CAP` decode steps' time, so that prompts which had to wait
   don't come back as one long step; where no chunk keeps the ITL target, 64 tokens. Where the
   pace of the decodes would leave an efficient one no headroom in an empty window, decodes go
   slower: the least efficient chunk then fits beside less of them, or the largest that an
   empty window would hold with idle power after it;
4. while prompts wait for the budget: nothing, for the decodes' share of slack, so that the
   headroom which they leave goes to the prompts; without an ITL target for the default decode
   interval, or a share of the time for which prompts have been held;
5. the decodes alone, slower where an empty window would not hold them at their pace: prompts
   wait for the window to move on;
6. as many of the decodes as an empty window would hold, if it would not hold all once:
   those that have waited longest;
7. nothing: a pause until what was refused could fit at the earliest (`policy/waits.py`).

When prompts have waited for their bound (`prefill_overdue`), the decodes wait until a chunk has
run or their own deadline comes. In a group that shares a budget, the order in which engines began
to wait decides (`policy/turns.py`).

A chunk is efficient when its joules per prompt token are near those of a long
chunk: a small one reads all the weights for a few tokens, unless decodes read
them anyway. Source: joules = base * seconds + per_byte * bytes + per_flop * FLOPs.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

from shaper.core.policy import Plan, PlanInput
from shaper.core.policy.sustained import RunningCap, cadence_seconds, slowest_seconds
from shaper.core.policy.turns import (
    comes_first_joules,
    crowds_prompts,
    fits_beside,
    others_held_seconds,
)
from shaper.core.policy.waits import LATE_RATIO, again_seconds, may_wait, wait, waited_until
from shaper.core.types import (
    NOTHING,
    UNLIMITED,
    Reason,
    StepBatch,
    StepLimits,
    StepPrediction,
)

# Chunk sizes tried, in tokens: what a chunk leaves of its deadline, the prompt's last tokens
# wait for. Multiples of 64, the tile of a GEMM.
CHUNK_TOKENS = tuple(range(64, 8192 + 1, 64))
# A prompt that has begun and ends within this part of a chunk ends the chunk: the next prompts
# lose the time of a small step, once, and its first token does not wait for theirs.
_TAIL_SHARE = 0.25
# A chunk this long costs about the least joules a token on every profile.
_LONG_CHUNK_TOKENS = 2048
# A chunk that costs up to a quarter more a token than a long one is still efficient: when no
# decode shares the weights, from 256 to 448 tokens for the dense built-in models on the
# profiles here, and about a thousand for the mixture of experts.
_EFFICIENT_RATIO = 1.25
# In decode steps. Without this bound the p99 of ITL rises over the unshaped one at 85% of
# the peak power (`python -m bench.demo` compares them); a smaller one costs more TTFT.
SOFT_STEP_CAP = 4.0
# Without an ITL target decodes make way for prompts that have been held for longer than a
# burst fills a window and leaves it again: by this share of the time, up to a pace that
# still reads as fluent. Where demand exceeds the budget, larger batches get more out of it.
PATIENCE_SECONDS = 0.25
PATIENCE_SHARE = 0.1
MOST_PATIENT_SECONDS = 0.1


class WindowedPlanner:
    """The policy above. Remembers the cap, and the efficient chunk by size of the decode batch."""

    def __init__(self) -> None:
        self._efficient_tokens: dict[int, int] = {}
        self._last_chunk = 0
        self._way_seconds = 0.0
        self._cap = RunningCap()

    def plan(self, view: PlanInput) -> Plan:
        """The limits of the next step, and why."""
        cap = self._cap.find(view)
        if cap is None:
            return self._plan(view)
        plan = self._plan(view._replace(load=view.load.capped(cap)))
        return plan._replace(limits=plan.limits._replace(running_requests=cap))

    def _plan(self, view: PlanInput) -> Plan:
        load, decodes = view.load, view.decodes
        wanted = load.batch()
        if not wanted.requests:
            return Plan(UNLIMITED, Reason.IDLE)
        cadence, slack = cadence_seconds(view), _slack_seconds(view)
        if decodes and not wanted.prefill_tokens:
            if view.spend_slack and may_wait(view, slack):
                return wait(view, Reason.ITL_SLACK, slack)
            if may_wait(view, slack) and crowds_prompts(view):
                return Plan(NOTHING, Reason.DECODE_PACING, slack, again_seconds(view))
            if cadence is not None and may_wait(view, cadence):
                return wait(view, Reason.DECODE_PACING, cadence)
        prediction = view.predict(wanted)
        fits_itl = _fits_itl(view, prediction)
        beside = comes_first_joules(view, prompts=bool(wanted.prefill_tokens))
        if fits_itl and fits_beside(view, prediction, beside):
            return Plan(UNLIMITED, Reason.UNCONSTRAINED, cadence)
        if wanted.prefill_tokens:
            waits = may_wait(view, slack)
            sharing = 0 if waits else load.decode_requests
            chunk = self._largest_chunk(view, wanted, sharing)
            if self._way_seconds and not waits:
                slack = _make_way_slack_seconds(view, self._way_seconds)
                waits = may_wait(view, slack)
            if chunk:
                reason = Reason.CHUNK_POWER if fits_itl else Reason.CHUNK_ITL
                return Plan(StepLimits(prefill_tokens=chunk), reason, cadence)
            if decodes and view.prefill_overdue and may_wait(view, view.decode_deadline_seconds):
                return Plan(NOTHING, Reason.PREFILL_OVERDUE)
            if waits:
                refused = self._refused(view, wanted, sharing, None)
                again = again_seconds(view, refused, waited_until(view, slack))
                return Plan(NOTHING, Reason.DECODE_PACING, slack, again)
        if decodes:
            if _never_fits(view, decodes):
                view.headroom.make_way(decodes, view.idle_watts)
            if fits_beside(view, decodes, comes_first_joules(view, prompts=False)):
                return Plan(StepLimits(prefill_tokens=0), Reason.DECODE_ONLY, cadence)
            some = _fitting_decodes(view, decodes)
            if some:
                return Plan(
                    StepLimits(prefill_tokens=0, decode_requests=some), Reason.PARTIAL_DECODE
                )
        refused = self._refused(view, wanted, load.decode_requests, decodes)
        return Plan(NOTHING, Reason.PAUSE, until_seconds=again_seconds(view, refused))

    def _largest_chunk(self, view: PlanInput, wanted: StepBatch, sharing_decodes: int) -> int:
        """Tokens of the largest efficient chunk that fits, 0 if none does.

        Args:
            view: of this step.
            wanted: what the engine would run.
            sharing_decodes: decodes that read the weights anyway. While they may still wait
                they don't, and a small chunk of a prompt would spend the headroom that they leave.
        """
        load = view.load
        beside = comes_first_joules(view, prompts=True)
        if not load.splittable:
            return _largest_whole(view, beside)
        most = wanted.prefill_tokens
        least = self._least_chunk(view, wanted, sharing_decodes)
        first, last = bisect_right(CHUNK_TOKENS, least), bisect_left(CHUNK_TOKENS, most)
        sizes = (least, *CHUNK_TOKENS[first:last], most)
        soft_cap = _soft_cap_seconds(view)

        def fits(tokens: int) -> bool:
            batch = load.batch(tokens)
            if not batch.prefill_tokens:
                return False  # below the blocks that a hybrid model takes whole
            prediction = view.predict(batch)
            # An overdue prompt may break the ITL target, by its smallest chunk.
            overdue_least = view.prefill_overdue and tokens == least
            if not (tokens == least or prediction.seconds <= soft_cap):
                return False
            if not (overdue_least or _fits_itl(view, prediction)):
                return False
            return fits_beside(view, prediction, beside)

        def possible(tokens: int) -> bool:
            step = view.predict(load.batch(tokens))
            return step.watts <= view.headroom.empty_watts(step.seconds, view.idle_watts)

        chunk, self._way_seconds = self._largest_fitting(sizes, fits), 0.0
        if not chunk and _never_fits(view, view.predict(load.batch(least))):
            # Decodes leave too little of any window: they make way.
            below = CHUNK_TOKENS[: bisect_left(CHUNK_TOKENS, least)]
            largest = least if possible(least) else self._largest_fitting(below, possible)
            if largest:
                step = view.predict(load.batch(largest))
                self._way_seconds = view.headroom.make_way(step, view.idle_watts)
                chunk = largest if fits(largest) else 0
        if not chunk:
            return self._min_chunk(view, least, beside)
        self._last_chunk = chunk
        tail = load.prefills[0].remaining_tokens if load.running_prefills else most
        return tail if tail < most and tail <= _TAIL_SHARE * chunk and fits(tail) else chunk

    def _largest_fitting(self, sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
        """The largest of these ascending sizes that fits, 0 if none does."""
        if not sizes:
            return 0
        # Steps in a row get about the same: the search begins where the last one ended, and
        # goes in strides that double until it has passed the answer.
        low, high, stride = -1, len(sizes), 1
        at = max(0, bisect_right(sizes, self._last_chunk) - 1)
        while high - low > 1:
            if fits(sizes[at]):
                low, at = at, at + stride
            else:
                high, at = at, at - stride
            if not low < at < high:
                at = (low + high) // 2
            stride *= 2
        return sizes[low] if low >= 0 else 0

    def _min_chunk(self, view: PlanInput, least: int, beside: float) -> int:
        """A chunk of 64 tokens where only the ITL target refuses an efficient one, else 0.

        A target that no chunk keeps must not stop prompts: it is broken by the little
        that this adds to a decode step. Decodes that have waited for slack go first.
        """
        if _fits_itl(view, view.predict(view.load.batch(least))):
            return 0
        if view.spend_slack and view.decodes and view.since_decode_seconds > view.decodes.seconds:
            return 0
        min_chunk = min(max(CHUNK_TOKENS[0], view.load.least_chunk_tokens), least)
        step = view.predict(view.load.batch(min_chunk))
        return min_chunk if fits_beside(view, step, beside) else 0

    def _refused(
        self,
        view: PlanInput,
        wanted: StepBatch,
        sharing_decodes: int,
        decodes: StepPrediction | None,
    ) -> Iterator[StepPrediction | None]:
        """What `again_seconds` asks for: the decodes, if any, and the least chunk of prompts."""
        if decodes is not None:
            yield decodes
        if wanted.prefill_tokens:
            step = view.predict(view.load.batch(self._least_chunk(view, wanted, sharing_decodes)))
            fits_later = _fits_itl(view, step) and not _never_fits(view, step)
            yield step if view.load.splittable and fits_later else None

    def _least_chunk(self, view: PlanInput, wanted: StepBatch, decodes: int) -> int:
        least = max(self._least_efficient(view, decodes), view.load.least_chunk_tokens)
        return min(least, wanted.prefill_tokens)

    def _least_efficient(self, view: PlanInput, decodes: int) -> int:
        # By powers of two: what a chunk costs changes slowly with the decode batch.
        key = decodes.bit_length()
        if key not in self._efficient_tokens:
            self._efficient_tokens[key] = _least_efficient_tokens(view, decodes)
        return self._efficient_tokens[key]


def _least_efficient_tokens(view: PlanInput, decodes: int) -> int:
    mean_context = view.load.decode_context_tokens // decodes if decodes else 0

    def joules(tokens: int) -> float:
        batch = StepBatch(
            decode_requests=decodes,
            decode_tokens=decodes,
            decode_context_tokens=decodes * mean_context,
            prefill_requests=1 if tokens else 0,
            prefill_tokens=tokens,
            prefill_context_tokens=tokens,
            prefill_token_context_product=tokens * tokens,
            prefill_squared_tokens=tokens * tokens,
        )
        return view.predict(batch).joules

    without = joules(0) if decodes else 0.0
    long_chunk = (joules(_LONG_CHUNK_TOKENS) - without) / _LONG_CHUNK_TOKENS
    for tokens in CHUNK_TOKENS:
        if (joules(tokens) - without) / tokens <= _EFFICIENT_RATIO * long_chunk:
            return tokens
    return _LONG_CHUNK_TOKENS


def _largest_whole(view: PlanInput, beside: float) -> int:
    """Tokens of as many whole prompts as fit, for an engine that can't split a prompt."""
    best = tokens = 0
    for demand in view.load.prefills:
        tokens += demand.remaining_tokens
        batch = view.load.batch(tokens)
        if batch.prefill_tokens < tokens:
            break
        prediction = view.predict(batch)
        itl = (view.prefill_overdue and not best) or _fits_itl(view, prediction)
        if not (itl and fits_beside(view, prediction, beside)):
            break
        best = tokens
    return best


def _fitting_decodes(view: PlanInput, decodes: StepPrediction) -> int:
    """How many decodes to run where even an empty window would not hold all, else 0."""
    if not _never_fits(view, decodes):
        return 0  # they fit soon: one step for all costs less than two for some
    load = view.load
    count = load.decode_requests // 2
    while count:
        share = count / load.decode_requests
        tokens, contexts = load.decode_tokens * share, load.decode_context_tokens * share
        if view.headroom.fits(view.predict(StepBatch(count, round(tokens), round(contexts)))):
            return count
        count //= 2
    return 0


def _never_fits(view: PlanInput, step: StepPrediction) -> bool:
    """Whether not even an empty window would hold the step."""
    return step.watts > view.headroom.empty_watts(step.seconds)


def _soft_cap_seconds(view: PlanInput) -> float:
    """How long a chunk that has to be cut anyway may keep decodes waiting."""
    if view.itl_target_seconds is not None or view.decodes is None:
        return math.inf
    return max(SOFT_STEP_CAP * view.decodes.seconds, _slack_seconds(view))


def _fits_itl(view: PlanInput, prediction: StepPrediction) -> bool:
    """Whether decodes that wait for this step and run again after it stay in the target."""
    target = view.itl_target_seconds
    if target is None or view.decodes is None or prediction.seconds <= view.decodes.seconds:
        return True
    # The decodes are in the chunk's own step: their next token comes when it ends.
    waited = max(0.0, view.since_decode_seconds)
    return waited + prediction.seconds * LATE_RATIO <= target


def _make_way_slack_seconds(view: PlanInput, window_seconds: float) -> float:
    """How long decodes may go without a step until a window has headroom for a chunk with them.

    Where they alone, however slow, leave it none, prompts get theirs when the window is empty.
    """
    if view.decodes is None or view.itl_target_seconds is not None:
        return 0.0
    held = max(view.held_seconds, others_held_seconds(view))
    return min(PATIENCE_SHARE * held, window_seconds + 2.0 * view.decodes.seconds)


def _slack_seconds(view: PlanInput) -> float:
    """How long decodes may go without a step where slack is spent."""
    if view.decodes is None:
        return 0.0
    slowest = slowest_seconds(view.targets, view.decodes)
    if view.itl_target_seconds is not None:
        return slowest
    held = max(view.held_seconds, others_held_seconds(view))
    if held < PATIENCE_SECONDS:
        return slowest
    return max(slowest, min(PATIENCE_SHARE * held, MOST_PATIENT_SECONDS))
