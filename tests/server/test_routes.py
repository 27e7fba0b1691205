"""The control routes, over engines whose samplers tick beside them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from shaper.config.model import build_config
from shaper.core.types import PowerState
from shaper.ipc.control_file import ControlFile
from shaper.server.routes import MAX_BODY_BYTES, ControlRoutes
from tests.controlled import run, watts
from tests.server.served import KEY, Served, served

__all__ = ["run", "served"]


def test_a_change_is_answered_when_every_engine_holds_it(served, caplog):
    """The answer shows it; the log says who, what and why, old and new."""
    with caplog.at_level(logging.INFO, logger="shaper"):
        status, answer = served.budget(
            {
                "limits": ["400W@1s", {"watts": 500, "window_seconds": 0.1}],
                "why": "rack 4",
                "who": "me",
            }
        )
    assert status == 200
    assert [each["source"] for each in answer["engines"]] == ["changed"] * 2
    assert {watts(control) for control in served.engines} == {500.0}
    assert answer["asked"]["budget"]["origin"]["who"] == "me (192.0.2.7)"
    assert "change 1 by me (192.0.2.7)" in caplog.text
    assert "rack 4" in caplog.text
    assert "560 W over 1 s -> 500 W over 0.1 s, 400 W over 1 s" in caplog.text
    assert KEY not in caplog.text
    status, answer = served.ask("DELETE", "/v1/shaper/budget")
    assert (status, answer["sequence"]) == (200, 2)
    assert {watts(control) for control in served.engines} == {560.0}


def test_mode_and_budget_do_not_undo_each_other(served):
    """Each request changes its own part of the file."""
    served.budget({"limits": ["400W@1s"]})
    status, answer = served.ask("PUT", "/v1/shaper/mode", {"mode": "off"})
    assert (status, answer["engines"][1]["mode"]) == (200, "off")
    assert {watts(control) for control in served.engines} == {400.0}
    served.ask("DELETE", "/v1/shaper/budget")
    assert {control.state.mode for control in served.engines} == {"off"}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"limts": ["400W@1s"]}, 422, "did you mean 'limits'"),
        ({"limits": ["400W"]}, 422, "no window"),
        ({"limits": [{"watts": 400, "window": 1}]}, 422, "did you mean 'window_seconds'"),
        ({"limits": ["400W@1s"], "fr": "1min"}, 422, "did you mean 'for'"),
        ({"limits": ["400W@1s"], "for": "10"}, 422, "no unit"),
        ({"limits": ["400W@1s"], "for": -3}, 422, "1 s to 366 days"),
        ({"limits": ["400W@1s"], "for": "1min", "until": "2099-01-01T00:00:00Z"}, 422, "one of"),
        ({"limits": ["400W@1s"], "until": "2099-01-01T00:00:00"}, 422, "has no zone"),
        ({"limits": ["400W@1s"], "until": 4e9}, 422, "no moment"),
        ({"limits": ["400W@1s"], "until": "2001-01-01T00:00:00Z"}, 422, "is over"),
        ({"limits": ["400W@1s"], "fallback": {"limits": []}}, 422, "give for or until"),
        ({"limits": ["400W@1s"], "for": "1min", "fallback": {}}, 422, "fallback says no limits"),
        (
            {"limits": ["400W@1s"], "for": "1min", "fallback": {"limts": []}},
            422,
            "did you mean 'limits'",
        ),
        ({"for": "1min"}, 422, "says no limits"),
        ({"ramp_watts_per_second": "200W"}, 422, "W/s"),
        ({"ramp_watts_per_second": 0}, 422, "outside 1 to"),
        ({"limits": ["400W@1s"], "why": "x" * 501}, 422, "500 characters"),
        ({"limits": ["115W@1s"]}, 409, "more than 115 W"),
        ({"gpu_limits": ["100W@1s"]}, 409, "each GPU draws idle"),
        ({"limits": ["400W@1s"], "gpu_limits": ["300W@1s"]}, 409, "contradict each other"),
        ({"limits": ["400W@1s"], "for": "1h", "fallback": {"limits": ["9W@1s"]}}, 409, "fallback"),
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "JSON object"),
        (b"[" * 60_000, 400, "not valid JSON"),
        (b'{"limits": [], "limits": []}', 400, "stands twice"),
        (b'{"limits": [{"watts": NaN, "window_seconds": 1}]}', 400, "NaN"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "more than"),
    ],
)
def test_bad_requests_say_what_to_do_and_change_nothing(served, body, status, says):
    """In OpenAI's form."""
    found, answer = served.budget(body)
    assert (found, set(answer)) == (status, {"error"}), answer
    assert says in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert {watts(control) for control in served.engines} == {560.0}
    assert not served.engines[0].state.seen_sequence


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer wrong-key-of-a-test")],
        [(b"authorization", f"Basic {KEY}".encode())],
        [(b"authorization", KEY.encode())],
        [(b"x-api-key", KEY.encode())],
        [(b"authorization", f"Bearer {KEY}".encode()), (b"authorization", b"Bearer x")],
    ],
)
def test_without_the_key_nothing_is_shown(served, headers, caplog):
    """Not even which routes there are; the log warns once and never shows a key."""
    for path in ("/v1/shaper/state", "/v1/shaper/nothing", "/v1/shaper"):
        status, answer = served.ask("GET", path, headers=headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_admin_key")
        assert served.headers[b"www-authenticate"] == b"Bearer"
    assert len(caplog.records) == 1
    assert "wrong-key" not in caplog.text


def test_wrong_methods_and_paths(served):
    """405 with what is allowed, 404 with what there is."""
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        assert served.ask(method, "/v1/shaper/budget")[0] == 405
        assert served.headers[b"allow"] == b"PUT, DELETE"
    for path in ("", "/", "/state/", "//state", "/state\n", "/docs"):
        assert served.ask("GET", f"/v1/shaper{path}")[0] == 404, path
    status, answer = served.ask("GET", "/v1/shaper/budgets")
    assert status == 404
    assert "/v1/shaper/state" in answer["error"]["message"]


def test_the_settings_come_from_vllms_application(monkeypatch, run):
    """Where the routes make their service themselves."""
    monkeypatch.setenv("_SHAPER_RUN_ID", run)
    served = Served(run, engines=0)
    served.routes = ControlRoutes(served.inner, key=KEY)
    settings = {"power_shaper": {"limits": ["560W@1s"]}}
    state = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=settings))
    found = served.ask("GET", "/v1/shaper/state", app=SimpleNamespace(state=state))[1]
    assert found["configured"]["limits"] == [{"watts": 560.0, "window_seconds": 1.0}]


def test_the_openapi_document_has_every_route_and_wants_the_key(served):
    """It is the same application that answers."""
    path = "/v1/shaper/openapi.json"
    assert served.ask("GET", path, headers=[])[0] == 401
    status, document = served.ask("GET", path)
    assert status == 200
    methods = {f"{m.upper()} {p}" for p, found in document["paths"].items() for m in found}
    assert methods == {
        *("PUT /v1/shaper/budget", "DELETE /v1/shaper/budget", "PUT /v1/shaper/mode"),
        *("PUT /v1/shaper/record", "DELETE /v1/shaper/record", "GET /v1/shaper/state"),
    }
    schemas = document["components"]["schemas"]
    assert {"BudgetRequest", "State", "ErrorAnswer"} <= set(schemas)
    assert {"type": "string"} in schemas["BudgetRequest"]["properties"]["for"]["anyOf"]


def test_everything_else_is_passed_on(served, run):
    """Other paths, other protocols, paths under a root; all of them where there is no key."""
    for path in ("/v1/models", "/v1/shaperx", "/"):
        assert served.ask("GET", path)[0] == 299
    assert served.ask("GET", "/vllm/v1/shaper/state", root_path="/vllm")[0] == 200
    assert served.ask("GET", "/v1/shaper/state", type="websocket")[0] == 299
    keyless = Served(run, key=None, engines=0)
    assert keyless.ask("GET", "/v1/shaper/state")[0] == 299


def test_an_engine_that_does_not_tick_is_named(served):
    """The change stands: the engine takes it when it runs again."""
    served.ticking = False
    status, answer = served.budget({"limits": ["400W@1s"]})
    assert (status, answer["error"]["code"]) == (504, "not_acknowledged")
    assert "engine 0, 1" in answer["error"]["message"]
    served.ticking = True
    assert served.engines[0].tick(1e6)
    assert watts(served.engines[0]) == 400.0


def test_without_an_engine_no_change_is_taken(run):
    """503 for a change; the state is still shown."""
    empty = Served(run, engines=0)
    assert empty.budget({"limits": ["400W@1s"]})[0] == 503
    assert empty.ask("GET", "/v1/shaper/state")[1]["engines"] == []


def test_a_spoilt_file_is_replaced_by_the_next_change(served):
    """Engines go on with the sequence that they know."""
    served.budget({"limits": ["400W@1s"]})
    ControlFile(served.run).path.write_text("{")
    assert "error" in served.ask("GET", "/v1/shaper/state")[1]["asked"]
    status, answer = served.budget({"limits": ["420W@1s"]})
    assert (status, answer["sequence"]) == (200, 2)
    assert {watts(control) for control in served.engines} == {420.0}


def test_the_state_is_json_and_shows_no_key(served):
    """Ends are shown as a moment and as seconds."""
    served.budget({"limits": ["400W@1s"], "for": "10min", "fallback": {"limits": ["450W@1s"]}})
    status, state = served.ask("GET", "/v1/shaper/state")
    assert status == 200
    assert KEY not in json.dumps(state, allow_nan=False)
    budget = state["asked"]["budget"]
    # The clock of this test runs 20 ms each time that it is asked.
    assert 500 < budget["seconds_left"] < 600
    assert budget["ends_at"].startswith("2027-01-15T08:0")
    assert budget["fallback"] == {"limits": [{"watts": 450.0, "window_seconds": 1.0}]}
    assert state["engines"][0]["next_change_in_seconds"] == pytest.approx(
        budget["seconds_left"], abs=10
    )


def test_what_people_write_can_not_break_a_log(served, caplog):
    """No line breaks and no escape sequences get through."""
    with caplog.at_level(logging.INFO, logger="shaper"):
        served.budget({"limits": ["400W@1s"], "why": "a\nchange 9 by root\x1b[2J", "who": "\r\n"})
    assert "a change 9 by root [2J" in caplog.text
    assert "unnamed (192.0.2.7)" in caplog.text
    assert not any("\n" in each.getMessage() for each in caplog.records)


def test_a_full_disk_is_an_answer(served, monkeypatch):
    """Nothing changes and nothing is left behind."""

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    status, answer = served.budget({"limits": ["400W@1s"]})
    assert (status, answer["error"]["code"]) == (503, "not_written")
    assert {watts(control) for control in served.engines} == {560.0}
    assert list(ControlFile(served.run).path.parent.glob(f"*{served.run}*.new")) == []


def test_a_limit_that_can_never_bind_is_answered_with_a_warning(served):
    """It holds all the same; once for engines alike, and by the enforced limit of this moment."""

    def enforced(watts: float) -> None:
        for said in served.said:
            said["power"] = PowerState(0.0, 1, enforced_limit_watts=watts)
        served.write()

    # Their clock goes on while a thread writes: on a busy machine for many seconds.
    loose = {"limits": ["900W@1s", "950W@100ms"], "for": "1h", "fallback": {"limits": "800W@1s"}}
    status, answer = served.budget(loose)
    assert (status, answer["warnings"]) == (200, [])  # no reading yet
    enforced(700.0)
    status, answer = served.budget(loose)
    assert status == 200
    assert [warning.split(";")[0] for warning in answer["warnings"]] == [
        "budget: power limit 900 W over 1 s can never bind: the enforced limit of the GPU is 700 W",
        "budget: power limit 950 W over 0.1 s can never bind: the enforced limit of the GPU is "
        "700 W, and 945 W in bursts under 0.5 s",
        "fallback: power limit 800 W over 1 s can never bind: the enforced limit of the GPU is "
        "700 W",
    ]
    served.seconds += 3700.0  # the change has ended, its fallback holds
    (fallback,) = served.ask("GET", "/v1/shaper/state")[1]["warnings"]
    assert fallback.startswith("fallback: ")
    assert served.budget({"limits": ["600W@1s", "900W@10ms"]})[1]["warnings"] == []
    enforced(500.0)
    served.service.config = build_config({"limits": ["560W@1s", "600W@100ms"]})
    found = served.ask("GET", "/v1/shaper/state")[1]
    assert [warning.split(" can ")[0] for warning in found["warnings"]] == [
        "budget: power limit 600 W over 1 s",
        "budget: power limit 900 W over 0.01 s",
        "configured budget: power limit 560 W over 1 s",
    ]
