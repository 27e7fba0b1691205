"""Admission at the API server: classes, marks, refusals, and what passes untouched."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.supervise.status import AdmissionState
from shaper.server import admission
from shaper.server.admission import MAX_BODY_BYTES, AdmissionMiddleware
from shaper.server.request_class import UnknownClassError, classify
from tests.server.exchange import DEFER, MARK, OPEN, ROUTE, SHAPED, SHED, Exchange, Fixed

FLEX_BODIES = [
    {"service_tier": "flex"},
    {"priority": 3},
    {"vllm_xargs": {"shaper_class": "flex"}},
    {"service_tier": "flex", "vllm_xargs": {"other": 1}},
    {"service_tier": "flex", "vllm_xargs": None},
    {"service_tier": "default", "priority": 1},
]
INTERACTIVE_BODIES = [
    {},
    {"service_tier": "auto"},
    {"service_tier": None, "priority": 0},
    {"priority": -2},
    {"priority": "5"},
    {"vllm_xargs": {"shaper_class": "interactive"}},
    {"prompt": "what does service_tier flex mean?"},
]


@pytest.mark.parametrize("path", ["/v1/completions", ROUTE, "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("body", FLEX_BODIES)
def test_a_flex_request_is_marked_for_the_engine(path: str, body: dict[str, Any]) -> None:
    """Whichever way it says so; the rest of it is as it was, and its length is right."""
    done = Exchange({"model": "m", **body}, path=path).go()
    assert done.status == 200
    found = json.loads(done.inside.body)
    assert found["vllm_xargs"] == {**(body.get("vllm_xargs") or {}), **MARK}
    found.pop("vllm_xargs")
    assert found == {"model": "m", **{k: v for k, v in body.items() if k != "vllm_xargs"}}
    assert int(done.inside.headers[b"content-length"]) == len(done.inside.body)


@pytest.mark.parametrize("state", [OPEN, SHAPED, DEFER, SHED])
@pytest.mark.parametrize("body", INTERACTIVE_BODIES)
def test_an_interactive_request_passes_as_it_came(
    state: AdmissionState, body: dict[str, Any]
) -> None:
    """In every state, byte for byte."""
    raw = json.dumps(body, indent=3).encode()
    done = Exchange(raw, state=state).go()
    assert done.status == 200
    assert done.inside.body == raw
    assert done.answer_headers == {"a": "b", "x-shaper-state": state.value}


@pytest.mark.parametrize("body", FLEX_BODIES)
def test_a_flex_request_is_refused_while_shed(body: dict[str, Any]) -> None:
    """429 in OpenAI's form, with when to come back; nothing reaches the engine."""
    done = Exchange({"model": "m", **body}, state=SHED).go()
    assert done.inside.calls == []
    assert done.status == 429
    assert set(done.answer) == {"error"}
    error = done.answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "resource_unavailable"
    assert 16 <= int(done.answer_headers["retry-after"]) <= 24
    assert done.answer_headers["x-shaper-state"] == "shed"
    assert int(done.answer_headers["content-length"]) == len(done.out[1]["body"])


@pytest.mark.parametrize("state", [OPEN, SHAPED, DEFER])
def test_a_flex_request_passes_in_the_other_states(state: AdmissionState) -> None:
    """Waiting is the engine's part."""
    done = Exchange({"service_tier": "flex"}, state=state).go()
    assert done.status == 200
    assert done.marked


@given(recovery=st.none() | st.floats(0.0, 1e6))
def test_when_to_come_back_is_bounded_and_spread(recovery: float | None) -> None:
    """From one second to 120, within 20% of the hint, and not the same for all."""
    seen = set()
    for _ in range(20):
        done = Exchange({"service_tier": "flex"}, state=SHED, recovery=recovery).go()
        seconds = int(done.answer_headers["retry-after"])
        milliseconds = int(done.answer_headers["retry-after-ms"])
        assert 1 <= seconds <= 120
        assert 1000 <= milliseconds <= 120_000
        assert seconds == math.ceil(milliseconds / 1000) or milliseconds % 1000 == 0
        if recovery is not None and 2.0 < recovery < 90.0:
            assert 0.799 * recovery <= milliseconds / 1000 <= 1.201 * recovery
            seen.add(milliseconds)
    if recovery is not None and 2.0 < recovery < 90.0:
        assert len(seen) > 1


KEY = "sk-batch-job"
BOUND = {KEY: "flex", "sk-people": "interactive"}
HASHED = {f"sha256:{hashlib.sha256(k.encode()).hexdigest().upper()}": v for k, v in BOUND.items()}


@pytest.mark.parametrize("keys", [BOUND, HASHED])
@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY} "}]
)
def test_a_bound_key_wins_over_what_the_request_says(
    keys: dict[str, Any], headers: dict[str, str]
) -> None:
    """Its requests are flex, whatever they claim; given as a digest it works the same."""
    claims = {"service_tier": "priority", "vllm_xargs": {"shaper_class": "interactive"}}
    done = Exchange({"model": "m"} | claims, headers=headers, keys=keys).go()
    assert done.marked
    done = Exchange({"model": "m"} | claims, headers=headers, keys=keys, state=SHED).go()
    assert done.status == 429


def test_a_request_of_an_interactive_key_may_lower_itself() -> None:
    """And one of a key that is bound to nothing as well; neither is raised by it."""
    for key in ("sk-people", "sk-other"):
        headers = {"Authorization": f"Bearer {key}"}
        plain = Exchange({"model": "m"}, headers=headers, keys=BOUND, state=SHED).go()
        assert plain.status == 200
        lowered = Exchange({"service_tier": "flex"}, headers=headers, keys=BOUND, state=SHED).go()
        assert lowered.status == 429


def test_vllms_priority_header_wins_over_the_body() -> None:
    """As in vLLM."""
    up = Exchange({"model": "m"}, headers={"X-Vllm-Priority": "4"}, state=SHED).go()
    assert up.status == 429
    down = Exchange({"priority": 4}, headers={"X-Vllm-Priority": "0"}, state=SHED).go()
    assert down.status == 200
    wrong = Exchange({"model": "m"}, headers={"X-Vllm-Priority": "soon"}, state=SHED).go()
    assert wrong.status == 200


def test_a_class_that_there_is_not_is_a_clear_error() -> None:
    """400, naming those that there are."""
    done = Exchange({"vllm_xargs": {"shaper_class": "felx"}}).go()
    assert done.status == 400
    assert done.inside.calls == []
    message = done.answer["error"]["message"]
    assert "felx" in message
    assert "interactive" in message
    assert "flex" in message


@pytest.mark.parametrize("chunk", [0, 1, 7])
@pytest.mark.parametrize("length", [True, False])
def test_bodies_may_come_in_pieces(chunk: int, length: bool) -> None:
    """With a length or chunked; afterwards the client's hanging up is heard."""
    body = {"messages": [{"role": "user", "content": "Grüße"}], "service_tier": "flex"}
    done = Exchange(body, chunk=chunk, length=length).go()
    assert done.marked
    assert (b"content-length" in done.inside.headers) == length
    _, receive, _ = done.inside.calls[0]
    assert asyncio.run(receive())["type"] == "http.disconnect"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"service_tier": "flex"',
        b'["service_tier"]',
        b'"service_tier"',
        b"\xff\xfe service_tier",
        b'{"service_tier": "flex", "vllm_xargs": [1]}',
        b'{"service_tier": ["flex"]}',
        b'{"priority": 1e999}',
        b"[" * 20_000 + b'"service_tier"',
        b"service_tier=flex&model=m",
    ],
)
def test_what_vllm_will_refuse_is_left_to_it(raw: bytes) -> None:
    """Not JSON, not an object, of the wrong types: untouched."""
    done = Exchange(raw).go()
    assert done.inside.body == raw
    assert done.status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b'\xef\xbb\xbf {"service_tier":"flex"}',
        b'\n\t {"service_tier":"flex","x":1e999,"y":0.1}',
        b'{"x": "{", "service_tier": "\\u0066lex"}',
    ],
)
def test_unusual_json_is_marked_and_stays_the_same(raw: bytes) -> None:
    """A byte order mark, numbers without a double, escapes."""
    done = Exchange(raw).go()
    found = json.loads(done.inside.body)
    assert found.pop("vllm_xargs") == MARK
    assert found == json.loads(raw)


def test_json_in_another_encoding_is_marked_too() -> None:
    """JSON is UTF-8, but Python reads UTF-16: only a bound key asks for a look at such a body."""
    raw = json.dumps({"model": "m"}).encode("utf-16")
    done = Exchange(raw, headers={"Authorization": f"Bearer {KEY}"}, keys=BOUND).go()
    assert json.loads(done.inside.body) == {"model": "m", "vllm_xargs": MARK}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=5), st.booleans())
def test_marking_changes_nothing_else(content: dict[str, Any], pretty: bool) -> None:
    """For any object: what vLLM parses is what the client sent, and the mark."""
    content = content | {"service_tier": "flex"}
    raw = json.dumps(content, indent=2 if pretty else None, ensure_ascii=pretty).encode()
    kind, body = classify(raw, [], None)
    assert kind == "flex"
    assert json.loads(body) == content | {"vllm_xargs": MARK}


@given(st.binary(max_size=60), st.sampled_from([None, "flex", "interactive"]))
def test_no_body_breaks_the_classification(raw: bytes, bound: Any) -> None:
    """Noise around the words that it looks for."""
    for body in (raw, b'{"priority":' + raw + b"}", b'{"vllm_xargs":{"shaper_class":' + raw):
        try:
            kind, marked = classify(body, [], bound)
        except UnknownClassError:
            continue
        assert kind in ("flex", "interactive")
        assert marked == body or kind == "flex"


def test_a_body_that_is_too_long_passes_unread() -> None:
    """In the pieces in which it came; the class of its key still counts."""
    raw = json.dumps({"service_tier": "flex", "prompt": "x" * MAX_BODY_BYTES}).encode()
    for length in (True, False):
        done = Exchange(raw, length=length, chunk=1 << 20, state=SHED).go()
        assert done.status == 200
        assert done.inside.body == raw
        assert len(done.inside.messages) == len(done.sent_in) - 1
    headers = {"Authorization": f"Bearer {KEY}"}
    assert Exchange(raw, headers=headers, keys=BOUND, state=SHED).go().status == 429


def test_a_packed_body_passes_unread() -> None:
    """Its words can't be seen."""
    done = Exchange({"service_tier": "flex"}, headers={"Content-Encoding": "gzip"}).go()
    assert not done.marked


def test_a_client_that_hangs_up_is_vllms_to_see() -> None:
    """In the middle of its body."""
    done = Exchange(b'{"service_tier": "fl', cut=True).go()
    assert [message["type"] for message in done.inside.messages] == [
        "http.request",
        "http.disconnect",
    ]


@pytest.mark.parametrize(
    ("path", "method", "type_"),
    [
        ("/health", "GET", "http"),
        ("/metrics", "GET", "http"),
        ("/v1/models", "GET", "http"),
        ("/tokenize", "POST", "http"),
        (ROUTE, "OPTIONS", "http"),
        ("/v1/realtime", "GET", "websocket"),
    ],
)
def test_other_routes_are_not_touched(path: str, method: str, type_: str) -> None:
    """Scope, receive and send are those that came, also while shed."""
    done = Exchange(
        {"service_tier": "flex"}, path=path, method=method, type_=type_, state=SHED
    ).go()
    scope, receive, send = done.inside.calls[0]
    assert (scope, receive, send) == (done.scope, done.receive, done.send)


def test_the_lifespan_passes() -> None:
    """It has neither path nor method."""
    seen = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    app = AdmissionMiddleware(inside, gates=Fixed(None))
    asyncio.run(app({"type": "lifespan"}, Exchange().receive, Exchange().send))
    assert seen == [{"type": "lifespan"}]


def test_without_a_budget_nothing_is_read() -> None:
    """Scope, receive and send are those that came; a flex request is not marked."""
    done = Exchange({"service_tier": "flex"}, state=None).go()
    scope, receive, send = done.inside.calls[0]
    assert (scope, receive, send) == (done.scope, done.receive, done.send)
    assert not done.marked


@pytest.mark.parametrize("what", ["classify", "_refusal", "server_config"])
def test_a_mistake_in_here_costs_no_request(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """It passes as it came, whole, once."""

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(admission, what, broken)
    done = Exchange({"service_tier": "flex"}, state=SHED, chunk=5)
    if what == "server_config":
        done.app._keys = None
    done.go()
    assert done.status == 200
    assert done.inside.body == b'{"service_tier": "flex"}'
    assert len(done.inside.calls) == 1
    assert dict(done.scope["headers"])[b"content-length"] == b"24"  # type: ignore[arg-type, index]


def test_keys_come_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process' environment; one that is wrong binds nothing."""
    monkeypatch.setenv("SHAPER_CONFIG", json.dumps({"api_key_classes": {KEY: "flex"}}))
    headers = {"Authorization": f"Bearer {KEY}"}
    done = Exchange({"model": "m"}, headers=headers)
    done.app._keys = None
    assert done.go().marked
    monkeypatch.setenv("SHAPER_CONFIG", "{]")
    done = Exchange({"model": "m"}, headers=headers)
    done.app._keys = None
    assert not done.go().marked
