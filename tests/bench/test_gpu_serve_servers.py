"""`bench.gpu_serve` with server processes: those that break, those that are told to end, and
two runs over vLLM on the emulated GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_serve
from bench.gpu_serving import serve
from bench.gpu_serving.plan import Run
from bench.gpu_serving.store import is_done
from bench.harness.machine import group_members
from tests.bench import fake_server
from tests.bench.gpu_serve_fakes import write_emulated_run

ROOT = Path(__file__).resolve().parents[2]


def command(out: Path, *arguments: str) -> int:
    return gpu_serve.main(["--out", str(out), "--emulate", "h200-sxm", "--quick", *arguments])


def _fake_shaper(*extra: str) -> Any:
    def made(arguments: Sequence[str]) -> tuple[str, ...]:
        return (sys.executable, str(fake_server.__file__), *extra, *arguments)

    return made


def test_a_server_without_a_recording_is_no_run(tmp_path, monkeypatch, capsys):
    """It answered all requests and left no recording: the stage fails, and is stopped."""
    monkeypatch.setattr(serve, "shaper_serve", _fake_shaper())
    monkeypatch.setattr(serve, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert command(tmp_path, "--stage", "unshaped", "--duration", "1s") == 1
    assert "left no recording" in capsys.readouterr().err
    assert not is_done(tmp_path / "unshaped")
    server = int((tmp_path / "unshaped" / "server.log").read_text().split()[2])
    assert group_members(server) == []


def test_a_server_that_crashes_shows_its_log(tmp_path, monkeypatch, capsys):
    """The end of the log is in the message, and an earlier result of that run is gone."""
    write_emulated_run(tmp_path / "unshaped", Run("unshaped"), None, seconds=1.0)
    monkeypatch.setattr(serve, "shaper_serve", _fake_shaper("crash"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert command(tmp_path, "--stage", "unshaped") == 1
    error = capsys.readouterr().err
    assert "no luck today" in error
    assert not is_done(tmp_path / "unshaped")


@pytest.mark.e2e
def test_two_runs_over_vllm(tmp_path):
    """Real servers on the emulated GPU, then virtual time and the report: the steps are those
    that the step model predicts, the limit is kept, and both sides have the same traffic."""
    pytest.importorskip("vllm")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SHAPER", "VLLM"))}
    arguments = ["--stage", "unshaped", "shaped-70", "virtual", "report", "--duration", "3s"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.gpu_serve", "--out", str(tmp_path)),
            *("--emulate", "h200-sxm", "--quick", "--pack", str(tmp_path / "pack"), *arguments),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["source"] == "emulated h200-sxm"
    for name in ("unshaped", "shaped-70"):
        measured, virtual = figures["runs"][name], figures["virtual"][name]
        assert measured["latency"]["requests_failed"] == 0
        assert measured["latency"]["output_tokens"] == virtual["latency"]["output_tokens"], (
            "another traffic"
        )
        assert virtual["prediction"]["with_prompts"]["median_absolute_ratio"] < 0.01
        assert measured["prediction"]["decodes_alone"]["median_absolute_ratio"] < 0.2
    unshaped, shaped = (figures["runs"][name]["power"] for name in ("unshaped", "shaped-70"))
    assert shaped["peak_watts"] < 0.9 * unshaped["peak_watts"]
    assert figures["runs"]["shaped-70"]["reasons"]
    meta = json.loads((tmp_path / "pack" / "meta.json").read_text())
    assert meta["emulated"] is True
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server(tmp_path, number):
    """Code 130 and one line; no server is left."""
    script = (
        "import sys\nfrom bench import gpu_serve\nfrom bench.gpu_serving import serve\n"
        "from tests.bench import fake_server\n"
        "serve.shaper_serve = lambda words: (sys.executable, fake_server.__file__, *words)\n"
        "sys.exit(gpu_serve.main(['--out', sys.argv[1], '--emulate', 'h200-sxm', '--stage', "
        "'unshaped', '--duration', '60s']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "warming up" in line:
            break
    server = int((tmp_path / "unshaped" / "server.log").read_text().split()[2])
    assert server in group_members(server)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == (
        "bench.gpu_serve: interrupted; the server is stopped, finished runs stay"
    )
    assert group_members(server) == []
