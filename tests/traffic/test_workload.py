"""Workloads: their text, and cutting and stretching them."""

from __future__ import annotations

import pytest

from shaper.traffic.workload import TimedRequest, Workload, prompt_token_ids


def test_prompts_are_reproducible_and_differ() -> None:
    """The same seed gives the same text; another request or seed gives other text."""
    request = TimedRequest(0.0, 100, 1)
    assert prompt_token_ids(request, 4, 1) == prompt_token_ids(request, 4, 1)
    assert prompt_token_ids(request, 4, 1) != prompt_token_ids(request, 5, 1)
    assert prompt_token_ids(request, 4, 1) != prompt_token_ids(request, 4, 2)


def test_prompt_ids_are_printable_bytes() -> None:
    """No id is outside printable ASCII, which a byte-level vocabulary always has."""
    ids = prompt_token_ids(TimedRequest(0.0, 5000, 1), 0, 0)
    assert len(ids) == 5000
    assert min(ids) >= 32
    assert max(ids) <= 126


def test_clipping_keeps_what_arrives_in_time() -> None:
    """A request at the very end of the duration is left out."""
    load = Workload("w", tuple(TimedRequest(float(i), 1, 1) for i in range(5)))
    assert len(load.clipped(3.0).requests) == 3
    assert len(load.clipped(10.0, requests=2).requests) == 2
    assert load.clipped(3.0).seed == load.seed


def test_stretching_to_a_rate() -> None:
    """The mean rate becomes the one asked for; order and lengths stay."""
    load = Workload("w", tuple(TimedRequest(2.0 * i, i + 1, 1) for i in range(11)))
    faster = load.at_rate(5.5)
    assert faster.span_seconds == pytest.approx(2.0)
    assert [r.prompt_tokens for r in faster.requests] == list(range(1, 12))
    with pytest.raises(ValueError, match="not above 0"):
        load.at_rate(0.0)


def test_totals() -> None:
    """Token totals are sums over the requests."""
    load = Workload("w", (TimedRequest(0.0, 3, 4), TimedRequest(1.0, 10, 20)))
    assert (load.prompt_tokens, load.output_tokens) == (13, 24)
    assert Workload("none", ()).span_seconds == 0.0
