"""The open-loop client against a fake server that streams events."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.harness.client import ClientOptions, ReplayProgress, replay, request_body
from bench.harness.latency import latency_figures
from shaper.traffic.workload import TimedRequest, Workload, prompt_token_ids
from tests.bench.fake_server import MODEL, FakeServer, serving


def workload(count: int, output_tokens: int = 5, spacing_seconds: float = 0.0) -> Workload:
    requests = tuple(
        TimedRequest(index * spacing_seconds, 10 + index, output_tokens) for index in range(count)
    )
    return Workload("test", requests, seed=7)


def test_every_token_is_timed_in_order() -> None:
    """A stream of n tokens gives n times, after the send, that don't go backwards."""
    with serving(FakeServer()) as url:
        result = replay(workload(4, output_tokens=9), ClientOptions(url, MODEL))
    assert [record.error for record in result.records] == [None] * 4
    for record in result.records:
        assert record.output_tokens == 9
        assert len(record.token_seconds) == 9
        assert record.token_seconds[0] >= record.sent_seconds >= record.due_seconds
        assert (np.diff(record.token_seconds) >= 0).all()
    assert result.finished_seconds == max(r.token_seconds[-1] for r in result.records)


def test_requests_leave_when_due_whatever_the_server_does() -> None:
    """Arrivals follow the schedule although no earlier request finishes: the loop is open."""
    server = FakeServer(fault="hang")
    with serving(server) as url:
        options = ClientOptions(url, MODEL, drain_seconds=1.0)
        result = replay(workload(6, spacing_seconds=0.05), options)
    assert len(server.arrivals) == 6
    due = [record.due_seconds - result.started_seconds for record in result.records]
    assert due == pytest.approx([0.05 * index for index in range(6)])
    assert all(record.sent_seconds >= record.due_seconds for record in result.records)


def test_a_request_that_never_ends_is_given_up() -> None:
    """After the drain time a hanging request is cancelled and counted, not waited for."""
    with serving(FakeServer(fault="hang")) as url:
        result = replay(workload(2), ClientOptions(url, MODEL, drain_seconds=0.3))
    errors = [record.error or "" for record in result.records]
    assert all("not finished" in error for error in errors)
    assert latency_figures(result).requests_failed == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("http_500", "HTTP 500: .*out of order"),
        ("error_event", "the engine is gone"),
        ("cut", "ended before its end mark"),
        ("endless", "more than the 5 tokens"),
    ],
)
def test_a_fault_of_the_server_is_an_error_of_the_request(fault: str, message: str) -> None:
    """Each way in which a stream can fail is told apart in the record."""
    with serving(FakeServer(fault=fault)) as url:
        result = replay(workload(1), ClientOptions(url, MODEL))
    (record,) = result.records
    assert record.error is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(record.error)


def test_events_may_be_cut_anywhere() -> None:
    """Odd chunk borders and CRLF line ends give the same tokens."""
    with serving(FakeServer(fault="split")) as url:
        result = replay(workload(3), ClientOptions(url, MODEL))
    assert [record.error for record in result.records] == [None] * 3
    assert [len(record.token_seconds) for record in result.records] == [5] * 3


def test_tokens_that_share_a_chunk_are_counted() -> None:
    """The server's usage tells how many tokens came; shared chunks are reported."""
    with serving(FakeServer(fault="several")) as url:
        result = replay(workload(1, output_tokens=6), ClientOptions(url, MODEL))
    figures = latency_figures(result)
    assert figures.output_tokens == 6
    assert len(result.records[0].token_seconds) == 3
    assert figures.chunks_with_several_tokens == 3


def test_no_server_is_an_error_of_each_request() -> None:
    """A refused connection fails the request, not the replay."""
    with serving(FakeServer()) as url:
        pass
    result = replay(workload(2), ClientOptions(url, MODEL))
    assert all(record.error is not None for record in result.records)
    assert latency_figures(result).requests_failed == 2


def test_requests_in_flight_are_bounded() -> None:
    """Beyond the bound a request fails unsent, and the server never sees it."""
    server = FakeServer(fault="hang")
    with serving(server) as url:
        options = ClientOptions(url, MODEL, max_in_flight=3, drain_seconds=1.0)
        result = replay(workload(8), options)
    unsent = [r for r in result.records if r.error and r.error.startswith("not sent")]
    assert len(unsent) == 5
    assert len(server.bodies) == 3
    assert len(result.records) == 8


def test_what_the_callback_raises_ends_the_replay() -> None:
    """A watcher that finds the server dead stops the replay early."""

    def watch(_: ReplayProgress) -> None:
        raise RuntimeError("the server ended")

    with serving(FakeServer()) as url, pytest.raises(RuntimeError, match="the server ended"):
        replay(workload(1000, spacing_seconds=0.05), ClientOptions(url, MODEL), watch)


def test_progress_is_reported() -> None:
    """The last report counts every request as sent and finished."""
    seen: list[ReplayProgress] = []
    with serving(FakeServer()) as url:
        replay(workload(3), ClientOptions(url, MODEL), seen.append)
    assert (seen[-1].sent, seen[-1].finished, seen[-1].total) == (3, 3, 3)


def test_body_asks_for_exact_lengths() -> None:
    """The prompt is as many token ids as the trace says, and the output's end is forced."""
    request = TimedRequest(0.0, 300, 40)
    body = json.loads(request_body(request, 3, 7, MODEL))
    assert body["prompt"] == prompt_token_ids(request, 3, 7)
    assert len(body["prompt"]) == 300
    assert body["max_tokens"] == 40
    assert body["ignore_eos"] is True
    assert body["stream"] is True
