"""The whole comparison, from the command line to the report, over a fake server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import demo
from bench.harness import live, tables
from bench.harness.machine import group_members
from shaper.core.types import PowerLimit
from tests.bench import fake_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_shaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """`shaper serve` is the fake server, and nothing waits longer than it must."""

    def serve(arguments: Sequence[str]) -> tuple[str, ...]:
        return (sys.executable, str(fake_server.__file__), *arguments)

    monkeypatch.setattr(live, "shaper_serve", serve)
    # However busy the machine of the tests is: its checks are judged.
    monkeypatch.setattr(tables, "host_late", lambda run: "")
    monkeypatch.setattr(live, "_WARM_UP_SECONDS", 0.3)
    monkeypatch.setattr(live, "_SETTLE_SECONDS", 0.1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SHAPER_LIMITS", "1W@1s")


def run_demo(out: Path, *arguments: str) -> int:
    return demo.main(
        ["--duration", "1s", "--rate", "10", "--no-self-check", "--out", str(out), *arguments]
    )


@pytest.mark.usefixtures("fake_shaper")
def test_the_comparison_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both runs are made, compared, printed and written, and what an earlier
    comparison left in the folder does not mix with it."""
    assert run_demo(tmp_path) == 0
    log = tmp_path / "shaped.decisions.jsonl"
    earlier = json.loads(log.read_text().splitlines()[-1])["t"]
    capsys.readouterr()
    assert run_demo(tmp_path) == 0
    assert json.loads(log.read_text().splitlines()[0])["t"] > earlier
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    unshaped, shaped = figures["runs"]

    # 40 ms of 700 W in 100 ms of 400 W; the fake one keeps its limit at 500 W.
    assert unshaped["power"]["peak_watts"] == pytest.approx(520.0, rel=0.01)
    assert figures["limit"]["watts"] == pytest.approx(
        0.85 * unshaped["power"]["peak_watts"], abs=0.1
    )
    assert shaped["power"]["peak_watts"] == pytest.approx(440.0, rel=0.01)
    assert "--shaper-off" in unshaped["command"]
    assert f"{figures['limit']['watts']:.1f}W@100ms" in shaped["command"]
    assert unshaped["latency"]["requests_failed"] == 0
    assert unshaped["latency"]["requests_finished"] == shaped["latency"]["requests_finished"] > 0
    assert unshaped["decisions"] is None
    assert set(shaped["decisions"]) == {"chunk_power"}

    assert "[1/7] starting server, unshaped" in printed
    assert "peak 100 ms power" in printed
    assert str(tmp_path / "report.html") in printed
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert page.count("plotly.js v") == 1
    for word in ("Decisions by reason", "Prefill chunks", "Inter-token latency", "seed 0"):
        assert word in page


@pytest.mark.usefixtures("fake_shaper")
def test_a_group_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three runs are made, summed, judged by one limit, printed and written."""
    assert run_demo(tmp_path, "--servers", "2", "--rate", "12", "--divided") == 0
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
        settings = demo.settings_of(line)
        assert live.shaping(settings, live.DIVIDED, limit) == (
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

    monkeypatch.setattr(live, "shaper_serve", serve)
    assert run_demo(tmp_path, "--servers", "2") == 2
    assert "no luck today" in capsys.readouterr().err
    log = (tmp_path / "unshaped-0.server.log").read_text()
    pid = int(log.split()[2]) if log else None
    assert pid is None or not Path(f"/proc/{pid}").exists()


INTERRUPTED_DEMO = """
import sys
from bench import demo
from bench.harness import live
from shaper.core.types import PowerLimit
from tests.bench import fake_server
live.shaper_serve = lambda arguments: (sys.executable, fake_server.__file__, *arguments)
sys.exit(demo.main(["--duration", "60s", "--no-self-check", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C or SIGTERM in mid-replay: code 130, one line, and no server left."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_DEMO, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "replaying" in line:
            break
    server = int((tmp_path / "unshaped.server.log").read_text().split()[2])
    assert server in group_members(server)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "bench.demo: interrupted; the servers are stopped"
    assert group_members(server) == []


@pytest.mark.e2e
def test_the_real_comparison(tmp_path: Path) -> None:
    """A few seconds of traffic through the real servers: every request finishes, the
    limit lowers the peak, and the shaper's decisions and both power traces are there."""
    arguments = ["--duration", "4s", "--rate", "4", "--no-self-check", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    unshaped, shaped = figures["runs"]
    for run in (unshaped, shaped):
        assert run["latency"]["requests_failed"] == 0
        assert run["power"]["limits"][0]["windows"] > 1000
    assert shaped["power"]["peak_watts"] < unshaped["power"]["peak_watts"]
    assert sum(shaped["decisions"].values()) > 100
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


def test_a_server_that_does_not_start_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with code 2 and shows the log's end."""

    def serve(arguments: Sequence[str]) -> tuple[str, ...]:
        return (sys.executable, str(fake_server.__file__), "crash", *arguments)

    monkeypatch.setattr(live, "shaper_serve", serve)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_demo(tmp_path) == 2
    message = capsys.readouterr().err
    assert "exit code 3" in message
    assert "no luck today" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--gpu", "h900"], "h900"),
        (["--model", "llama-99"], "known: "),
        (["--duration", "soon"], "--duration"),
        (["--duration", "-5s"], "--duration"),
        (["--rate", "0"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--seed", "-1"], "--seed"),
        (["--limit-ratio", "85"], "--limit-ratio"),
        (["--itl-target", "fast"], "itl"),
        (["--trace", "no-such-file.csv"], "no-such-file.csv"),
        (["--nonsense"], "--nonsense"),
        (["--out", "/dev/null/x"], "--out"),
        (["--servers", "9"], "--servers 9 is not 1 to 8"),
        (["--servers", "two"], "--servers"),
        (["--divided"], "--servers 2 or more"),
        (["--duration", "1s", "--rate", "1", "--servers", "8"], "too few for 8 servers"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Code 2 and one line that names what is wrong, before a server starts."""
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert demo.main([*arguments, *out]) == 2
    message = capsys.readouterr().err
    assert what in message
    assert message.count("\n") == 1


def test_a_broken_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line's number is in the message."""
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,1\noops\n")
    assert demo.main(["--trace", str(trace), "--out", str(tmp_path / "out")]) == 2
    assert f"{trace}, line 3: 1 columns" in capsys.readouterr().err
