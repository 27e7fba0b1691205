"""The windowed-energy planner.

Objective: the most tokens in this step, subject to every window of the budget
and to the inter-token latency (ITL) target.

Law: a step fits when its predicted mean watts are at most what the ledger
leaves for a step of its length, with decodes going on after it. In order:

0. where slack shall be spent and only decodes are ready: nothing, for `SLACK_SHARE` of
   their ITL target. A decode step mostly reads weights, so its joules hardly depend on
   how many share it;
1. what the engine wants, if it fits: then nothing is limited;
2. all decodes and the largest efficient prefill chunk that fits; without an ITL target
   it takes at most `GENTLE_STEPS` decode steps' time, so that prompts which had to wait
   don't come back as one long step; where no chunk keeps the ITL target, 64 tokens;
3. the decodes alone: prompts wait for the window to move on;
4. nothing: a pause of one poll (about 1 ms), then the question is asked again.

When prompts have waited for their bound (`turn`), step 3 is left out until a
chunk has run: the decodes pause until the chunk fits.

A chunk is efficient when its joules per prompt token are near those of a long
chunk: a small one reads all the weights for a few tokens, unless decodes read
them anyway. Source: joules = base * seconds + per_byte * bytes + per_flop * FLOPs.
"""

from __future__ import annotations

from shaper.core.policy import Plan, PlanInput
from shaper.core.types import NOTHING, UNLIMITED, Reason, StepBatch, StepLimits, StepPrediction

# Chunk sizes tried, in tokens. Steps of about a third: finer ones change the step's
# energy by less than the prediction's error. Multiples of 64, the tile of a GEMM.
CHUNK_TOKENS = (
    *(64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024),
    *(1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
)
# A chunk this long costs about the least joules a token on every profile.
_LONG_CHUNK_TOKENS = 2048
# A chunk that costs up to a quarter more a token than a long one is still efficient: when no
# decode shares the weights, from 256 to 448 tokens for the dense built-in models on the
# profiles here, and about a thousand for the mixture of experts.
_EFFICIENT_RATIO = 1.25
# A held engine is asked again after a millisecond, and is then launched with nothing
# queued before it; a step may take a little longer than predicted.
_POLL_SECONDS = 0.003
_LATE_RATIO = 1.02
# How much of the ITL target decodes wait. The rest is room for a chunk under the same
# deadline: waiting for all of it saves little more energy and costs TTFT.
SLACK_SHARE = 0.35
# In decode steps. Without this bound the p99 of ITL rises over the unshaped one at 85% of
# the peak power (`python -m bench.demo` compares them); a smaller one costs more TTFT.
GENTLE_STEPS = 4.0


class WindowedPlanner:
    """The policy above. Remembers only the efficient chunk, by size of the decode batch."""

    def __init__(self) -> None:
        self._efficient_tokens: dict[int, int] = {}

    def plan(self, view: PlanInput) -> Plan:
        """The limits of the next step, and why."""
        load = view.load
        wanted = load.batch()
        if not wanted.requests:
            return Plan(UNLIMITED, Reason.IDLE)
        decodes = view.predict(load.batch(0)) if load.decode_requests else None
        reserve_seconds = decodes.seconds if decodes else 0.0
        if decodes and not wanted.prefill_tokens and _has_slack(view, decodes.seconds):
            return Plan(NOTHING, Reason.SLACK)
        prediction = view.predict(wanted)
        fits_itl = _fits_itl(view, prediction, reserve_seconds)
        if fits_itl and _fits(view, prediction):
            return Plan(UNLIMITED, Reason.UNCONSTRAINED)
        if wanted.prefill_tokens:
            chunk = self._largest_chunk(view, wanted, reserve_seconds)
            if chunk:
                reason = Reason.CHUNK_POWER if fits_itl else Reason.CHUNK_ITL
                return Plan(StepLimits(prefill_tokens=chunk), reason)
            if view.turn:
                return Plan(NOTHING, Reason.TURN)
        if decodes and _fits(view, decodes):
            return Plan(StepLimits(prefill_tokens=0), Reason.DECODE_ONLY)
        return Plan(NOTHING, Reason.PAUSE)

    def _largest_chunk(self, view: PlanInput, wanted: StepBatch, reserve_seconds: float) -> int:
        """Tokens of the largest efficient chunk that fits, 0 if none does."""
        load = view.load
        if not load.splittable:
            return _largest_whole(view, reserve_seconds)
        least = min(self._least_efficient(view), wanted.prefill_tokens)
        sizes = [least]
        sizes += [c for c in CHUNK_TOKENS if least < c < wanted.prefill_tokens]
        sizes.append(wanted.prefill_tokens)

        def fits(tokens: int) -> bool:
            prediction = view.predict(load.batch(tokens))
            # A prompt whose turn it is may break the ITL target, by its smallest chunk.
            least_turn = view.turn and tokens == least
            gentle = tokens == least or _is_gentle(view, prediction, reserve_seconds)
            itl = least_turn or _fits_itl(view, prediction, reserve_seconds)
            return gentle and itl and _fits(view, prediction)

        if not fits(least):
            return self._crumb(view, least, reserve_seconds)
        low, high = 0, len(sizes)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
        return sizes[low]

    def _crumb(self, view: PlanInput, least: int, reserve_seconds: float) -> int:
        """A chunk of 64 tokens where only the ITL target refuses an efficient one, else 0.

        A target that no chunk keeps must not stop prompts: it is broken by the little
        that this adds to a decode step. Decodes that have waited for slack go first.
        """
        if _fits_itl(view, view.predict(view.load.batch(least)), reserve_seconds):
            return 0
        if view.spend_slack and view.since_decode_seconds > reserve_seconds:
            return 0
        crumb = min(CHUNK_TOKENS[0], least)
        return crumb if _fits(view, view.predict(view.load.batch(crumb))) else 0

    def _least_efficient(self, view: PlanInput) -> int:
        decodes = view.load.decode_requests
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


def _largest_whole(view: PlanInput, reserve_seconds: float) -> int:
    """Tokens of as many whole prompts as fit, for an engine that can't split a prompt."""
    best = tokens = 0
    for demand in view.load.prefills:
        tokens += demand.remaining_tokens
        batch = view.load.batch(tokens)
        if batch.prefill_tokens < tokens:
            break
        prediction = view.predict(batch)
        itl = (view.turn and not best) or _fits_itl(view, prediction, reserve_seconds)
        if not (itl and _fits(view, prediction)):
            break
        best = tokens
    return best


def _fits(view: PlanInput, prediction: StepPrediction) -> bool:
    return prediction.watts <= view.room.max_watts(prediction.seconds)


def _is_gentle(view: PlanInput, prediction: StepPrediction, reserve_seconds: float) -> bool:
    """Whether a chunk that has to be cut anyway keeps decodes waiting for a short time only."""
    if view.itl_target_seconds is not None or not reserve_seconds:
        return True
    return prediction.seconds <= GENTLE_STEPS * reserve_seconds


def _fits_itl(view: PlanInput, prediction: StepPrediction, reserve_seconds: float) -> bool:
    """Whether decodes that wait for this step and run again after it stay in the target."""
    target = view.itl_target_seconds
    if target is None or not reserve_seconds or prediction.seconds <= reserve_seconds:
        return True
    # The decodes are in the chunk's own step: their next token comes when it ends.
    waited = view.since_decode_seconds if view.spend_slack else 0.0
    return waited + prediction.seconds * _LATE_RATIO <= target


def _has_slack(view: PlanInput, decode_seconds: float) -> bool:
    """Whether decodes may wait another poll."""
    target = view.itl_target_seconds
    if not view.spend_slack or target is None:
        return False
    waited = view.since_decode_seconds + decode_seconds * _LATE_RATIO + _POLL_SECONDS
    return waited < target * SLACK_SHARE
