"""What the doctor says of a running server: over a small HTTP server that can be odd."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from shaper.doctor.findings import Finding, Status
from shaper.doctor.server import check_url, samples, server_findings
from shaper.errors import ConfigError
from tests.doctor.fakes import KEY, METRICS, STATE, FakeServer, serving

WITH_KEY = {"SHAPER_ADMIN_KEY": KEY}


def asked(server: FakeServer, environ: dict[str, str] | None = None) -> dict[str, Finding]:
    found = server_findings(server.url, environ or {}, timeout_seconds=10.0)
    return {finding.check: finding for finding in found}


def changed(old: str, new: str) -> FakeServer:
    assert old in METRICS
    return FakeServer(metrics=METRICS.replace(old, new))


def test_a_shaped_server_is_well():
    """Metrics, mode, readings, counters and routes."""
    with serving(FakeServer()) as server:
        found = asked(server, WITH_KEY)
    assert {check: finding.status for check, finding in found.items()} == dict.fromkeys(
        [
            *("server.answers", "server.metrics", "server.mode", "server.readings"),
            *("server.counters", "server.routes"),
        ],
        Status.OK,
    )
    assert "560 W over 1 s" in found["server.mode"].found


def test_routes_without_a_key_are_up_and_want_one():
    """That is what they should say, and the key is sent to them alone."""
    with serving(FakeServer()) as server:
        found = asked(server)["server.routes"]
        assert (found.status, found.data["authorised"]) == (Status.OK, False)
        asked(server, WITH_KEY)
    assert [path for path, key in server.asked if key is not None] == ["/v1/shaper/state"]


def test_a_wrong_key_fails_and_is_not_shown():
    """Neither the right one nor the wrong one."""
    wrong = "f" * 32
    with serving(FakeServer()) as server:
        found = asked(server, {"SHAPER_ADMIN_KEY": wrong})
    assert found["server.routes"].status is Status.FAIL
    assert wrong not in str(found)
    assert KEY not in str(found)


def test_a_server_without_the_shaper_fails():
    """It serves, and keeps to no budget; it doesn't get the key."""
    with serving(FakeServer(metrics="vllm:num_requests_running 1.0\n", state=None)) as server:
        found = asked(server, WITH_KEY)
    assert found["server.metrics"].status is Status.FAIL
    assert found["server.routes"].status is Status.WARN
    assert not [key for _, key in server.asked if key is not None]


@pytest.mark.parametrize(
    ("old", "new", "check", "status"),
    [
        ('sample_age_seconds{engine="0"} 0.011', 'sample_age_seconds{engine="0"} 7.5',
         "server.readings", Status.FAIL),
        ('heartbeat_age_seconds{engine="0"} 0.011', 'heartbeat_age_seconds{engine="0"} NaN',
         "server.readings", Status.FAIL),
        ('sensor_lost{engine="0"} 0.0', 'sensor_lost{engine="0"} 1.0',
         "server.readings", Status.FAIL),
        ('mode="on"} 1.0', 'mode="off"} 1.0', "server.mode", Status.WARN),
        ('errors_total{engine="0"} 0.0', 'errors_total{engine="0"} 2.0',
         "server.counters", Status.WARN),
    ],
)  # fmt: skip
def test_what_metrics_complain_of_is_found(old: str, new: str, check: str, status: Status) -> None:
    """Stale readings, a lost sensor, shaping switched off, failures that were counted."""
    with serving(changed(old, new)) as server:
        assert asked(server)[check].status is status


def test_the_state_s_own_complaints_are_found():
    """A control file that is not believed, and an engine that lags behind."""
    lagging = {**STATE, "engines": [{"engine": 1, "acknowledged_sequence": 3}]}
    for state, status in (
        ({**STATE, "asked": {"error": "broken"}}, Status.FAIL),
        (lagging, Status.WARN),
        ({"engines": "none"}, Status.WARN),
    ):
        with serving(FakeServer(state=state)) as server:
            assert asked(server, WITH_KEY)["server.routes"].status is status


def test_a_server_that_never_ends_its_answer_hangs_nobody():
    """The deadline is on the whole of a request."""
    with serving(FakeServer(drips=True)) as server:
        (found,) = server_findings(server.url, {}, timeout_seconds=0.3)
    assert found.status is Status.FAIL
    assert "0.3 s" in found.found or "timed out" in found.found


def test_nobody_there_fails_only_where_somebody_was_named():
    """Without `--url` a host without a server is as good as any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        (found,) = server_findings(url, {}, timeout_seconds=5.0)
    assert found.status is Status.FAIL
    assert "refused" in found.found


def test_another_program_on_the_port_is_told():
    """It answers, and is no vLLM."""
    with serving(FakeServer(metrics=None)) as server:
        (found,) = server_findings(server.url, {}, timeout_seconds=5.0)
    assert found.status is Status.FAIL
    assert "404" in found.found


@pytest.mark.parametrize(
    "url", ["ftp://a", "a:8000", "http://", "http://h:99999", "http://h/x?y", "http://u:secret@h"]
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    """A usage error."""
    with pytest.raises(ConfigError) as refused:
        check_url(url)
    assert "secret" not in str(refused.value)


def test_urls_are_cut_to_the_server():
    """As people write them."""
    assert check_url("http://h:1/v1/") == "http://h:1"
    assert check_url("https://[::1]:8/") == "https://[::1]:8"


def test_terminal_codes_of_a_hostile_server_are_not_passed_on():
    """A label is somebody else's text."""
    hostile: Any = METRICS.replace("llama-3.1-8b", "\x1b[31mred\x07")
    with serving(FakeServer(metrics=hostile)) as server:
        found = asked(server)
    assert "\x1b" not in found["server.metrics"].found


def test_a_hostile_page_of_metrics_takes_no_time_to_speak_of():
    """Lines that make a careless pattern try everything are skipped or read straight through."""
    page = "shaper_a{" + "a" * 2_000_000 + "} 1\nshaper_b{" + 'a="' * 600 + "} 1\n"
    assert len(samples(page * 2)) <= 2


def test_broken_lines_of_metrics_are_left_out():
    """What can be read is read."""
    found = samples('shaper_a{x="1"} 2\nshaper_b{x=} two\nnoise\nshaper_c NaN\n')
    assert [sample.name for sample in found] == ["shaper_a", "shaper_c"]
