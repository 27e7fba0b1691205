"""What a step computes, read from the scheduler's output; and which tokens come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.types import StepBatch
from shaper.emulator.batching import RequestTracker, TrackedRequest, TrackedStep
from shaper.emulator.sampling import (
    LONGEST_ANSWER,
    SHORTEST_ANSWER,
    TokenSource,
    alternatives,
    logprob_rows,
)

END = 256


def scheduled(
    new: list[tuple[str, int, int, int]] | None = None,
    cached: list[tuple[str, int, int, int]] | None = None,
    finished: set[str] | None = None,
) -> Any:
    """A scheduler output. New: (id, prompt, computed, tokens); cached: (id, computed, tokens,
    outputs)."""
    new, cached = new or [], cached or []
    tokens = {name: n for name, _, _, n in new} | {name: n for name, _, n, _ in cached}
    return SimpleNamespace(
        finished_req_ids=finished or set(),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=list(range(prompt)),
                sampling_params=None,
                num_computed_tokens=computed,
            )
            for name, prompt, computed, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _, _ in cached],
            num_computed_tokens=[computed for _, computed, _, _ in cached],
            num_output_tokens=[outputs for _, _, _, outputs in cached],
        ),
    )


def observe(tracker: RequestTracker, **steps: Any) -> TrackedStep:
    step = tracker.observe(scheduled(**steps))
    assert step is not None
    return step


def test_a_prompt_in_chunks_then_decodes() -> None:
    """Chunks are prefill and sample nothing until the last; then each step is a decode."""
    tracker = RequestTracker()
    first = observe(tracker, new=[("a", 100, 0, 64)])
    assert first.batch == StepBatch(
        prefill_requests=1,
        prefill_tokens=64,
        prefill_context_tokens=64,
        prefill_token_context_product=64 * 64,
        prefill_squared_tokens=64 * 64,
    )
    assert first.outputs == [None]
    last = observe(tracker, cached=[("a", 64, 36, 0)])
    assert last.batch.prefill_token_context_product == 36 * 100
    assert last.batch.prefill_squared_tokens == 36 * 36
    assert last.outputs == [0]
    # With async scheduling the token in flight is counted as an output already.
    decode = observe(tracker, cached=[("a", 100, 1, 1)])
    assert decode.batch == StepBatch(decode_requests=1, decode_tokens=1, decode_context_tokens=101)
    assert decode.outputs == [1]


def test_a_held_decode_comes_back_as_a_returned_request() -> None:
    """Absent for a step, back as a decode; one that stays is not counted."""
    tracker = RequestTracker()
    observe(tracker, new=[("a", 8, 0, 8), ("b", 8, 0, 8)])
    assert observe(tracker, cached=[("b", 8, 1, 1)]).batch.returned_requests == 0
    both = observe(tracker, cached=[("a", 8, 1, 1), ("b", 9, 1, 2)])
    assert both.batch.decode_requests == 2
    assert both.batch.returned_requests == 1


def test_an_empty_step_drops_everyone_from_the_batch() -> None:
    """A GPU worker re-adds requests after a step without tokens."""
    tracker = RequestTracker()
    observe(tracker, new=[("a", 8, 0, 8)])
    assert tracker.observe(scheduled()) is None
    assert observe(tracker, cached=[("a", 8, 1, 1)]).batch.returned_requests == 1


def test_a_preempted_request_prefills_what_it_knew() -> None:
    """It recomputes prompt and outputs, samples at the end, and is no returned decode."""
    tracker = RequestTracker()
    observe(tracker, new=[("a", 10, 0, 10), ("b", 10, 0, 10)])
    observe(tracker, cached=[("b", 10, 1, 1)])
    half = observe(tracker, cached=[("a", 0, 8, 5)])
    assert half.outputs == [None]
    assert half.batch.prefill_tokens == 8
    assert half.batch.returned_requests == 0
    rest = observe(tracker, cached=[("a", 8, 7, 5)])
    assert rest.outputs == [5]
    assert rest.batch.prefill_context_tokens == 15


def test_a_finished_request_is_forgotten() -> None:
    """Also by a step without tokens: nothing leaks."""
    tracker = RequestTracker()
    observe(tracker, new=[("a", 8, 0, 8), ("b", 8, 0, 8)])
    tracker.observe(scheduled(finished={"a"}))
    assert len(tracker) == 1
    tracker.observe(scheduled(finished={"b", "unknown"}))
    assert len(tracker) == 0


def test_rows_follow_the_scheduler() -> None:
    """Requests stand in the order of `num_scheduled_tokens`, new ones last as vLLM has it."""
    tracker = RequestTracker()
    observe(tracker, new=[("a", 4, 0, 4), ("b", 4, 0, 4)])
    output = scheduled(new=[("c", 4, 0, 4)], cached=[("b", 4, 1, 1), ("a", 4, 1, 1)])
    output.num_scheduled_tokens = {"b": 1, "a": 1, "c": 4}
    step = tracker.observe(output)
    assert step is not None
    assert [request.request_id for request in step.requests] == ["b", "a", "c"]
    assert step.outputs == [1, 1, 0]


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.integers(0, 4999), st.integers(1, 5000)),
        min_size=1,
        max_size=20,
    )
)
def test_sums_match_their_definition(rows: list[tuple[int, int, int]]) -> None:
    """The batch is the sum over its requests, whatever the mix."""
    new = []
    for index, (prompt, computed, tokens) in enumerate(rows):
        computed = min(computed, prompt - 1)
        new.append((str(index), prompt, computed, min(tokens, prompt - computed)))
    batch = observe(RequestTracker(), new=new).batch
    decodes = [(c, n) for _, prompt, c, n in new if c == prompt - 1]
    chunks = [(c, n) for _, prompt, c, n in new if c < prompt - 1]
    assert batch.tokens == sum(n for *_, n in new)
    assert batch.decode_context_tokens == sum(c + n for c, n in decodes)
    assert batch.prefill_requests == len(chunks)
    assert batch.prefill_context_tokens == sum(c + n for c, n in chunks)
    assert batch.prefill_token_context_product == sum(n * (c + n) for c, n in chunks)
    assert batch.prefill_squared_tokens == sum(n * n for _, n in chunks)


def request(prompt: list[int] | None = None, **parameters: Any) -> TrackedRequest:
    prompt = [1, 2, 3] if prompt is None else prompt
    values = {"max_tokens": 50, "eos_token_id": END, "min_tokens": 0, "seed": None} | parameters
    return TrackedRequest("a", prompt, len(prompt), SimpleNamespace(**values))


def source(vocabulary: int = 1000) -> TokenSource:
    return TokenSource(vocabulary, max_model_length=1000)


def picks(tracked: TrackedRequest, count: int = 50) -> list[int]:
    tokens = source()
    return [tokens.pick(tracked, index) for index in range(count)]


def test_tokens_depend_on_the_prompt_and_the_seed_alone() -> None:
    """The same request gets the same text, in any order of asking."""
    assert picks(request()) == picks(request())
    assert picks(request(), 20) == [source().pick(request(), index) for index in range(20)]
    assert picks(request()) != picks(request([1, 2, 4]))
    assert picks(request()) != picks(request(seed=7))


def test_tokens_print_and_never_end_a_request_early() -> None:
    """A request that names max_tokens gets that many, each one printable character."""
    text = picks(request(max_tokens=900), 900)
    assert bytes(text).decode("ascii").isprintable()


def test_an_answer_without_a_limit_ends_by_itself() -> None:
    """Where the client leaves the length open, as chat clients do."""
    tracked = request(max_tokens=997)
    text = picks(tracked, LONGEST_ANSWER + 1)
    assert SHORTEST_ANSWER <= text.index(END) <= LONGEST_ANSWER
    tracked = request(max_tokens=997, eos_token_id=None)
    assert END not in picks(tracked, 900)
    tracked = request(max_tokens=997, min_tokens=600)
    assert picks(tracked, 700).index(END) == 600


def test_min_tokens_holds_stop_tokens_back() -> None:
    """As the sampler does, which masks them."""
    free = picks(request())
    stops = set(free[:10])
    held = picks(request(min_tokens=10, all_stop_token_ids=stops))
    assert not stops & set(held[:10])
    assert held[10:] == free[10:]


def test_allowed_tokens_are_the_only_ones() -> None:
    """`allowed_token_ids` is honoured."""
    assert set(picks(request(allowed_token_ids=[5, 700]))) <= {5, 700}


@given(st.sets(st.integers(0, 999), min_size=1), st.booleans())
def test_a_grammar_is_obeyed(allowed: set[int], with_end: bool) -> None:
    """The token is one that the bitmask allows; the end comes first where it is allowed."""
    if with_end:
        allowed = allowed | {END}
    mask = np.zeros(32, dtype=np.int64)
    for token in allowed:
        mask[token >> 5] |= 1 << (token & 31)
    row = mask.astype(np.uint32).view(np.int32)
    token = source().pick(request(), 0, row)
    assert token in allowed
    assert token == END or END not in allowed


def test_a_grammar_at_its_end_ends_the_request() -> None:
    """An empty bitmask leaves only the end token."""
    assert source().pick(request(), 0, np.zeros(32, dtype=np.int32)) == END


@pytest.mark.parametrize("count", [0, 1, 20, 200])
def test_log_probabilities_are_plausible(count: int) -> None:
    """The sampled token stands first at rank 1; a row's probabilities stay below 1."""
    ids, logprobs, ranks = logprob_rows([65, None, 66], count, 1000)
    assert ids.shape == logprobs.shape == (3, count + 1)
    assert ids[0, 0] == 65
    assert ids[2, 0] == 66
    assert ranks.tolist() == [1, 1, 1]
    assert np.all(np.exp(logprobs.astype(np.float64)).sum(axis=1) < 1.0)
    assert np.all(np.diff(logprobs, axis=1) < 0)


@given(st.integers(0, 255), st.integers(0, 255))
def test_alternatives_are_distinct(token: int, count: int) -> None:
    """Each token is named once."""
    names = alternatives(token, count, 1000)
    assert len(names) == len(set(names)) == count + 1
    assert names[0] == token
