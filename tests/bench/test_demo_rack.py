"""Servers that share a limit, from the command line to the report, over fake servers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import demo_rack, live_rack
from bench.demo_rack_page import RackComparison, rack_checks, steady_tokens_per_second
from bench.harness.client import Replay, RequestRecord
from bench.live_rack import RackSettings, deal, sum_power
from shaper.core.types import PowerLimit
from shaper.emulator.trace import PowerTrace, Stall
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import TimedRequest, Workload
from tests.bench import fake_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_shaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """`shaper serve` is the fake server, and nothing waits longer than it must."""

    def serve(arguments: Sequence[str]) -> tuple[str, ...]:
        return (sys.executable, str(fake_server.__file__), *arguments)

    monkeypatch.setattr(live_rack, "shaper_serve", serve)
    monkeypatch.setattr(live_rack, "_WARM_UP_SECONDS", 0.5)
    monkeypatch.setattr(live_rack, "_SETTLE_SECONDS", 0.1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_every_request_is_dealt_once() -> None:
    """In turn, at its own time."""
    load = synthesise(20.0, 5.0, seed=1)
    parts = deal(load, 3)
    assert sorted(r.arrival_seconds for part in parts for r in part.requests) == [
        r.arrival_seconds for r in load.requests
    ]
    assert max(len(part.requests) for part in parts) <= len(load.requests) // 3 + 1
    assert parts[1].requests[0] == load.requests[1]


def test_power_is_added_up_on_one_clock() -> None:
    """Traces that start at different times and off the grid keep their joules where they lie."""
    first = PowerTrace(np.array([[0.0, 0.0104, 100.0], [0.0104, 0.05, 500.0]]))
    second = PowerTrace(np.array([[0.0203, 0.0300, 700.0]]), (Stall(0.025, 0.003),))
    grids, total = sum_power([first, second], 0.0, 0.04)
    assert len(total.watts) == 40
    assert total.joules == pytest.approx(0.0104 * 100 + 0.0296 * 500 + 0.0097 * 700)
    assert grids[1].watts[20] == pytest.approx(490.0)  # 0.7 ms of 700 W
    assert grids[1].watts[30:].tolist() == pytest.approx([0.0] * 10)
    assert total.stalls == (Stall(0.025, 0.003),)


@pytest.mark.parametrize(
    ("tokens", "held"), [(10, True), (9, False)], ids=["all-in-time", "a-tenth-late"]
)
def test_throughput_is_judged_while_requests_arrive(tokens: int, held: bool) -> None:
    """What comes before the first quarter is over, or after the last arrival, counts for none."""

    def run(each_second: int) -> Any:
        seconds = np.arange(0.0, 60.0, 1 / each_second, dtype=np.float64) + 100.0
        records = [RequestRecord(TimedRequest(0.0, 1, 1), 100.0, 100.0, seconds, 2 * len(seconds))]
        for lost in (np.full(5000, 105.0), np.full(5000, 141.0)):
            records.append(RequestRecord(TimedRequest(40.0, 1, 1), 100.0, 100.0, lost, len(lost)))
        power = SimpleNamespace(
            limits=[SimpleNamespace(unstalled_worst_ratio=0.9, unstalled_windows=1)]
        )
        figures = SimpleNamespace(requests_failed=0)
        replay = Replay(tuple(records), 100.0, 160.0, 0.0, 0.0)
        return SimpleNamespace(replays=(replay,), power=power, latency=figures)

    load = Workload("test", (TimedRequest(0.0, 1, 1), TimedRequest(40.0, 1, 1)))
    limit, settings = PowerLimit(900.0, 0.1), RackSettings(load, Path())
    comparison = RackComparison(settings, limit, (run(10), run(tokens)))
    assert steady_tokens_per_second(comparison, comparison.runs[0]) == pytest.approx(20.0, rel=0.01)
    assert [each for each, _ in rack_checks(comparison)] == [True, held, True]
    short = replace(comparison, settings=replace(settings, workload=load.clipped(20.0)))
    assert rack_checks(short)[1][0] is None


@pytest.mark.usefixtures("fake_shaper")
def test_the_comparison_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three runs are made, summed, judged by one limit, printed and written."""
    arguments = ["--duration", "1s", "--rate", "12", "--divided", "--out", str(tmp_path)]
    assert demo_rack.main(arguments) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    unshaped, divided, shared = figures["runs"]
    # Both burst at the same time: twice 40 ms of 700 W in 100 ms of 400 W; limited, of 500 W.
    assert unshaped["power"]["peak_watts"] == pytest.approx(1040.0, rel=0.01)
    assert shared["power"]["peak_watts"] == pytest.approx(880.0, rel=0.01)
    limit = figures["limit"]["watts"]
    assert limit == pytest.approx(0.7 * unshaped["power"]["peak_watts"], abs=0.1)
    target = ["--itl-target", "100ms"]
    assert divided["flags"] == ["--power-limit", f"{limit / 2:.1f}W@100ms", *target]
    assert shared["flags"][0] == "--power-group"
    assert shared["flags"][2:] == ["--group-limit", f"{limit:.1f}W@100ms", *target]
    for run in figures["runs"]:
        assert run["latency"]["requests_failed"] == 0
        assert run["latency"]["requests_finished"] == unshaped["latency"]["requests_finished"] > 5
    # The fakes keep no limit, and the command says so.
    assert figures["checks"][0]["holds"] is False
    assert "DOES NOT HOLD: shared: no window of all GPUs together is above" in printed
    assert "[1/10] starting 2 servers, unshaped" in printed
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "server 1" in page


def test_the_target_can_be_left_out(tmp_path: Path) -> None:
    """Decodes then wait only as the limit asks."""
    limit = PowerLimit(900.0, 0.1)
    for word, flags in (("none", []), ("50ms", ["--itl-target", "50ms"])):
        line = ["--itl-target", word, "--servers", "3", "--out", str(tmp_path)]
        settings, _ = demo_rack._settings(line)
        assert demo_rack.shaping(settings, demo_rack.DIVIDED, limit) == (
            *("--power-limit", "300.0W@100ms"),
            *flags,
        )


@pytest.mark.usefixtures("fake_shaper")
def test_one_server_that_does_not_start_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 2, its log's end, and no server is left."""
    started: list[int] = []

    def serve(arguments: Sequence[str]) -> tuple[str, ...]:
        started.append(1)
        crash = ["crash"] * (len(started) == 2)
        return (sys.executable, str(fake_server.__file__), *crash, *arguments)

    monkeypatch.setattr(live_rack, "shaper_serve", serve)
    assert demo_rack.main(["--duration", "1s", "--rate", "9", "--out", str(tmp_path)]) == 2
    assert "no luck today" in capsys.readouterr().err
    log = (tmp_path / "unshaped-0.server.log").read_text()
    pid = int(log.split()[2]) if log else None
    assert pid is None or not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--servers", "1"], "--servers 1 is not 2 to 8"),
        (["--servers", "9"], "--servers 9 is not 2 to 8"),
        (["--servers", "two"], "--servers"),
        (["--duration", "1s", "--rate", "1", "--servers", "8"], "too few for 8 servers"),
        (["--gpu", "h900"], "h900"),
        (["--model", "llama-99"], "known: "),
        (["--itl-target", "fast"], "itl"),
        (["--limit-ratio", "80"], "--limit-ratio"),
        (["--out", "/dev/null/x"], "--out"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 2 and one line that names what is wrong, before a server starts."""
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert demo_rack.main([*arguments, *out]) == 2
    message = capsys.readouterr().err
    assert what in message
    assert message.count("\n") == 1
