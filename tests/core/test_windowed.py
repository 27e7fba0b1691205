"""The windowed-energy planner's choices, on a model whose steps can be worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.ledger.ledger import Ledger
from shaper.core.ledger.shared import GroupView
from shaper.core.policy import Plan, PlanInput
from shaper.core.policy.sustained import DEFAULT_DECODE_INTERVAL, SLACK_SHARE
from shaper.core.policy.windowed import SOFT_STEP_CAP, WindowedPlanner
from shaper.core.types import (
    EngineLoad,
    LatencyTargets,
    PowerBudget,
    PowerLimit,
    PrefillDemand,
    Reason,
    StepBatch,
    StepPrediction,
)
from tests import strategies

IDLE = 100.0


def predict(batch: StepBatch) -> StepPrediction:
    """6 ms for the weights at 400 W, and 20 us a prompt token at 700 W on top."""
    seconds = 0.006 + 20e-6 * batch.prefill_tokens
    return StepPrediction(seconds, 2.4 + 700.0 * 20e-6 * batch.prefill_tokens)


def view(
    load, limits=(), itl=None, turn=False, ledger=None, floor=IDLE, since=0.0, slack=False, **more
) -> PlanInput:
    ledger = ledger or Ledger(PowerBudget(tuple(limits)), IDLE, 0.0)
    return PlanInput(
        load=load,
        headroom=ledger.ask(ledger.end_seconds, floor),
        targets=LatencyTargets(itl, None, slack),
        decodes=predict(load.batch(0)) if load.decode_requests else None,
        decode_deadline_seconds=itl or 1.0,
        since_decode_seconds=since,
        prefill_overdue=turn,
        idle_watts=IDLE,
        **{"predict": predict, **more},
    )


BOTH = EngineLoad(8, 8, 8000, prefills=(PrefillDemand(4000, 0),))
PROMPTS = EngineLoad(prefills=(PrefillDemand(4000, 0),))
DECODES = EngineLoad(8, 8, 8000)


# A window that the past has nearly filled, and one that it has filled.
FULL = [(0.0, 0.094, 506.0)], PowerLimit(500.0, 0.1)
OVER = [(0.0, 0.1, 300.0)], PowerLimit(300.0, 0.1)
EASY_SECONDS = DEFAULT_DECODE_INTERVAL * predict(BOTH.batch(0)).seconds


@pytest.mark.parametrize(
    ("load", "past", "asked", "reason", "runs"),
    [
        (EngineLoad(), None, {}, Reason.IDLE, True),
        (BOTH, ([], PowerLimit(900.0, 0.1)), {}, Reason.UNCONSTRAINED, True),
        # A prompt alone is not cut for a target of decodes.
        (PROMPTS, None, {"itl": 0.04}, Reason.UNCONSTRAINED, True),
        # Decodes make way for a prompt within an easy pace, and run alone after it.
        (BOTH, FULL, {}, Reason.DECODE_PACING, False),
        (BOTH, FULL, {"since": EASY_SECONDS}, Reason.DECODE_ONLY, True),
        # In its turn a prompt that does not fit yet holds the decodes, too.
        (BOTH, FULL, {"turn": True}, Reason.PREFILL_OVERDUE, False),
        (DECODES, OVER, {}, Reason.PAUSE, False),
    ],
)
def test_each_reason_comes_where_it_should(load, past, asked, reason, runs):
    """What fits is not limited; what does not waits, cut to what the window and the turn allow."""
    ledger = past and strategies.ledger_of(*past)
    plan = WindowedPlanner().plan(view(load, ledger=ledger, **asked))
    assert plan.reason is reason
    assert plan.limits.run is runs
    assert plan.limits.binding is (reason not in (Reason.IDLE, Reason.UNCONSTRAINED))
    assert plan.limits.prefill_tokens == (0 if reason is Reason.DECODE_ONLY else None) or not runs


def test_a_prompt_is_cut_to_what_the_window_holds():
    """The chunk fits, and the next larger size does not."""
    limits = [PowerLimit(500.0, 0.1)]
    plan = WindowedPlanner().plan(view(BOTH, limits, itl=1.0))
    assert plan.reason is Reason.CHUNK_POWER
    chunk = plan.limits.prefill_tokens
    assert chunk is not None
    headroom = Ledger(PowerBudget(tuple(limits)), IDLE, 0.0).ask(0.0, IDLE)
    fits = predict(BOTH.batch(chunk))
    larger = predict(BOTH.batch(chunk + 512))
    assert fits.watts <= headroom.max_watts(fits.seconds)
    assert larger.watts > headroom.max_watts(larger.seconds)


def test_the_itl_target_bounds_the_chunks_step():
    """Decodes share the chunk's step, so their next token comes when it ends."""
    plan = WindowedPlanner().plan(view(BOTH, itl=0.04))
    assert plan.reason is Reason.CHUNK_ITL
    assert plan.limits.prefill_tokens is not None
    step = predict(BOTH.batch(plan.limits.prefill_tokens)).seconds
    assert 0.04 * 0.7 < step <= 0.04


def test_without_a_target_a_cut_chunk_is_still_short():
    """A prompt that the budget cuts lasts at most four decode steps, where more would fit."""
    limits = [PowerLimit(560.0, 0.1)]
    free = WindowedPlanner().plan(view(BOTH, limits, itl=1.0)).limits.prefill_tokens
    gentle = WindowedPlanner().plan(view(BOTH, limits)).limits.prefill_tokens
    assert (
        predict(BOTH.batch(gentle)).seconds
        <= SOFT_STEP_CAP * 0.006
        < predict(BOTH.batch(free)).seconds
    )


def test_chunks_without_decodes_are_efficient_ones():
    """Without decodes the weights are read for the chunk alone, so crumbs are not worth it."""
    planner = WindowedPlanner()
    alone = planner._least_efficient(view(PROMPTS), 0)
    shared = planner._least_efficient(view(BOTH), 8)
    assert alone >= 256
    assert shared <= 64

    def per_token(tokens: int) -> float:
        return predict(PROMPTS.batch(tokens)).joules / tokens

    assert per_token(alone) <= 1.25 * per_token(2048)


def test_an_engine_that_cannot_split_gets_whole_prompts():
    """Whole prompts as far as they fit, never a part of one."""
    load = EngineLoad(
        prefills=(PrefillDemand(600, 0), PrefillDemand(600, 0), PrefillDemand(4000, 0)),
        splittable=False,
    )
    plan = WindowedPlanner().plan(view(load, [PowerLimit(430.0, 0.1)]))
    assert plan.limits.prefill_tokens in (600, 1200)


def test_slack_is_spent_on_decodes_alone():
    """With slack to spend decodes wait for a part of their target, and prompts never."""
    planner = WindowedPlanner()
    waiting = planner.plan(view(DECODES, itl=0.05, slack=True, since=0.0))
    assert waiting.reason is Reason.ITL_SLACK
    assert not waiting.limits.run
    due = planner.plan(view(DECODES, itl=0.05, slack=True, since=SLACK_SHARE * 0.05))
    assert due.reason is Reason.UNCONSTRAINED
    assert planner.plan(view(BOTH, itl=0.05, slack=True)).limits.run
    assert planner.plan(view(DECODES, itl=0.05, slack=False)).limits.run


def test_a_chunk_counts_the_time_that_decodes_have_waited():
    """What a chunk takes and what decodes have waited before it share one deadline."""
    planner = WindowedPlanner()
    fresh = planner.plan(view(BOTH, itl=0.05, slack=True)).limits.prefill_tokens
    later = planner.plan(view(BOTH, itl=0.05, slack=True, since=0.02)).limits.prefill_tokens
    assert fresh is not None
    assert later is not None
    assert predict(BOTH.batch(fresh)).seconds <= 0.05
    assert 0.02 + predict(BOTH.batch(later)).seconds <= 0.05
    assert later < fresh


@pytest.mark.parametrize("slack", [False, True])
def test_a_target_that_no_chunk_keeps_does_not_stop_prompts(slack):
    """Below the length of a decode step, prompts go on in the smallest pieces."""
    plan = WindowedPlanner().plan(view(BOTH, itl=0.005, slack=slack))
    assert plan.reason is Reason.CHUNK_ITL
    assert plan.limits.prefill_tokens == 64
    waited = WindowedPlanner().plan(view(BOTH, itl=0.007, slack=True, since=0.01))
    assert waited.reason is Reason.DECODE_ONLY


def test_decodes_alone_keep_their_pace_while_no_prompt_waits():
    """Without a target only a prompt that waits slows them; with one a burst may ask for it."""
    limits = [PowerLimit(600.0, 0.1)]
    free = view(DECODES, limits, burst_joules=45.0, prefill_watts=50.0)
    assert WindowedPlanner().plan(free).reason is Reason.UNCONSTRAINED
    paced = view(DECODES, limits, itl=0.05, burst_joules=45.0, prefill_watts=50.0)
    assert WindowedPlanner().plan(paced).reason is Reason.DECODE_PACING


def test_a_prompt_that_has_begun_and_ends_early_in_a_chunk_ends_it():
    """Its first token does not wait for a long piece of the next prompt."""

    def chunk(first: PrefillDemand, running: int, itl: float | None = 0.05) -> int | None:
        prefills = (first, *[PrefillDemand(600, 0)] * 8)
        load = EngineLoad(8, 8, 8000, prefills=prefills, running_prefills=running)
        return WindowedPlanner().plan(view(load, itl=itl)).limits.prefill_tokens

    assert chunk(PrefillDemand(100, 3000), running=1) == 100
    assert (chunk(PrefillDemand(1000, 3000), running=1) or 0) > 1000
    assert chunk(PrefillDemand(100, 3000), running=1, itl=None) is None
    # Short prompts that wait go together.
    assert (chunk(PrefillDemand(100, 0), running=0) or 0) > 1000


def test_a_window_that_holds_no_efficient_chunk_gets_the_largest_that_it_may():
    """A window of 10 ms never holds 192 tokens or more, and 128 when it is empty enough."""
    ledger = Ledger(PowerBudget((PowerLimit(500.0, 0.01),)), IDLE, 0.0)
    plan = WindowedPlanner().plan(view(PROMPTS, ledger=ledger))
    assert plan.limits.prefill_tokens == 128
    ledger.spend(0.0, 0.01, 6.0)  # now 64 would fit, and 128 are waited for
    assert ledger.ask(0.01, IDLE).fits(predict(PROMPTS.batch(64)))
    assert not WindowedPlanner().plan(view(PROMPTS, ledger=ledger)).limits.run


@given(
    st.lists(st.integers(1, 9000), unique=True, max_size=150).map(sorted),
    st.integers(0, 9000),
    st.integers(0, 9000),
)
def test_the_search_finds_the_largest_size_that_fits(sizes, most, last):
    """From wherever it begins; a size that has just been found costs two questions."""
    planner = WindowedPlanner()
    planner._last_chunk = last
    asked = []

    def fits(tokens: int) -> bool:
        asked.append(tokens)
        return bool(tokens <= most)

    found = planner._largest_fitting(sizes, fits)
    assert found == max((size for size in sizes if size <= most), default=0)
    assert len(set(asked)) == len(asked)
    planner._last_chunk = found
    asked.clear()
    assert planner._largest_fitting(sizes, fits) == found
    assert len(asked) <= 2


@given(
    strategies.loads(),
    strategies.limits,
    st.sampled_from([None, 0.02, 0.1]),
    st.booleans(),
    strategies.runs,
)
def test_what_is_allowed_always_fits(load, limits, itl, turn, runs):
    """Whatever the load, the past and the limits: a step that is allowed to run fits them all."""
    ledger = strategies.ledger_of(runs, *limits)
    seen = view(load, itl=itl, turn=turn, ledger=ledger)
    plan = WindowedPlanner().plan(seen)
    batch = load.batch(plan.limits.prefill_tokens)
    if plan.limits.run and batch.requests:
        step = predict(batch)
        assert step.watts <= seen.headroom.max_watts(step.seconds)
        if itl is not None and load.decode_requests and batch.prefill_tokens and not turn:
            assert step.seconds <= itl or batch.prefill_tokens <= 64
    assert plan.limits.decode_requests is None
    assert not math.isnan(seen.headroom.max_watts(0.01))


def planned_after(
    load: EngineLoad, seconds: float = 0.0, *, watts=480.0, limit=450.0, **more
) -> Plan:
    """The plan after 100 ms at these watts and so many seconds of idle power."""
    runs = [(0.0, 0.1, watts), (0.0, seconds, IDLE)]
    ledger = strategies.ledger_of(runs, PowerLimit(limit, 0.1))
    return WindowedPlanner().plan(view(load, ledger=ledger, now_seconds=0.1 + seconds, **more))


@pytest.mark.parametrize("load", [DECODES, PROMPTS, BOTH])
def test_a_pause_ends_when_the_first_of_what_was_refused_may_fit(load):
    """Before its date the same load is refused again, whenever it is asked about."""
    late = 0.1  # decodes that would else make way for the prompt
    plan = planned_after(load, since=late)
    assert plan.reason is Reason.PAUSE
    assert plan.until_seconds is not None
    wait = plan.until_seconds - 0.1
    assert 0.0 < wait < 0.1
    for share in (0.3, 0.7, 0.99):
        assert planned_after(load, share * wait, since=late).reason is Reason.PAUSE
    assert planned_after(load, wait + 1e-6, since=late).limits.run


def test_decodes_that_make_way_have_a_date_within_their_pace():
    """A prompt's headroom comes later than the decodes' turn: these end the pause."""
    plan = planned_after(BOTH, watts=506.0, limit=500.0)
    assert plan.reason is Reason.DECODE_PACING
    assert plan.until_seconds is not None
    assert plan.cadence_seconds is not None
    assert 0.1 < plan.until_seconds < 0.1 + plan.cadence_seconds


def test_a_prompt_that_cannot_be_split_is_asked_about_at_every_poll():
    """Which of several prompts comes first is found anew each time."""
    plan = planned_after(EngineLoad(prefills=PROMPTS.prefills, splittable=False))
    assert plan.reason is Reason.PAUSE
    assert plan.until_seconds is None


def test_in_a_group_a_refusal_is_short_and_costs_no_further_prediction():
    """Another engine may make room at any time, and a member is refused most of the time."""
    counts, dates = [], []
    for group in (None, GroupView(())):
        asked: list[StepBatch] = []
        plan = planned_after(
            BOTH, since=0.1, predict=lambda b, a=asked: a.append(b) or predict(b), group=group
        )
        assert plan.reason is Reason.PAUSE
        counts.append(len(asked))
        dates.append(plan.until_seconds or 0.0)
    assert counts[1] < counts[0]
    assert 0.1 < dates[1] < dates[0]
