"""`bench.studies.gpu` with processes: servers that break or are told to end, and a whole run
over vLLM on the emulated GPU.
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

from bench.harness.machine import group_members
from bench.studies.gpu import __main__ as study
from bench.studies.gpu import serve
from bench.studies.gpu.plan import RUNS
from bench.studies.gpu.store import is_done
from shaper.gpu.profiles import load_profile
from tests.bench import fake_server
from tests.studies.gpu_fakes import write_emulated_run

ROOT = Path(__file__).resolve().parents[2]


def command(out: Path, *arguments: str) -> int:
    stage = ("--emulate", "h200-sxm", "--quick", "--stages", "unshaped")
    return study.main(["--out", str(out), *stage, *arguments])


def _fake_shaper(*extra: str) -> Any:
    def made(arguments: Sequence[str]) -> tuple[str, ...]:
        return (sys.executable, str(fake_server.__file__), *extra, *arguments)

    return made


def test_a_server_without_a_recording_is_no_run(tmp_path, monkeypatch, capsys):
    """It answered all requests and left no recording: the stage fails, and is stopped."""
    monkeypatch.setattr(serve, "shaper_serve", _fake_shaper())
    monkeypatch.setattr(serve, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert command(tmp_path, "--duration", "1s") == 1
    assert "left no recording" in capsys.readouterr().err
    assert not is_done(tmp_path / "unshaped")
    server = int((tmp_path / "unshaped" / "server.log").read_text().split()[2])
    assert group_members(server) == []


def test_a_server_that_crashes_shows_its_log(tmp_path, monkeypatch, capsys):
    """The end of the log is in the message, and a half result of that run is gone."""
    write_emulated_run(tmp_path / "unshaped", RUNS["unshaped"], None, seconds=1.0)
    (tmp_path / "unshaped" / "stage.json").write_text("{}")
    monkeypatch.setattr(serve, "shaper_serve", _fake_shaper("crash"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert command(tmp_path) == 1
    assert "no luck today" in capsys.readouterr().err
    assert not (tmp_path / "unshaped" / "recording.parquet").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server(tmp_path, number):
    """Code 130 and one line; no server is left."""
    script = (
        "import sys\nfrom bench.studies.gpu import __main__ as study, serve\n"
        "from tests.bench import fake_server\n"
        "serve.shaper_serve = lambda words: (sys.executable, fake_server.__file__, *words)\n"
        "sys.exit(study.main(['--out', sys.argv[1], '--emulate', 'h200-sxm', '--stages', "
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
        "bench.studies.gpu: interrupted; the engine is stopped, what was measured stays"
    )
    assert group_members(server) == []


@pytest.mark.e2e
def test_a_signal_ends_the_engine_s_process(tmp_path):
    """Code 130; the stage under way keeps its points, and no process is left."""
    pytest.importorskip("vllm")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "bench.studies.gpu", "--out", str(tmp_path)),
            *("--emulate", "h200-sxm", "--stages", "gap"),
        ],
        cwd=ROOT,
        env=_environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "gap: batch" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not is_done(tmp_path / "gap")
    stage = json.loads((tmp_path / "gap" / "stage.json").read_text())
    assert [point["when"] for point in stage["points"]][:2] == ["idle, cold", "cold"]
    assert group_members(process.pid) == []


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("SHAPER", "VLLM"))}


@pytest.mark.e2e
def test_a_whole_run_over_vllm(tmp_path):
    """vLLM's engine, then two servers, on the emulated GPU: each step is as it was asked for,
    the gap power is the profile's, the limit is kept, and the recording can be fitted."""
    pytest.importorskip("vllm")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.studies.gpu", "--out", str(tmp_path)),
            *("--emulate", "h200-sxm", "--quick", "--duration", "3s"),
            *("--pack", str(tmp_path / "pack")),
        ],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    for name in ("decode", "prefill"):
        stage = json.loads((tmp_path / name / "stage.json").read_text())
        assert stage["skipped"] == []
        for point in stage["points"]:
            settings = point["settings"]
            each = settings.get("batch") or settings["chunk_tokens"]
            assert point["tokens"] == point["steps"] * each
    figures = json.loads((tmp_path / "figures.json").read_text())
    profile = load_profile("h200-sxm")
    for between in figures["between_steps"]:
        assert between["gap_watts"] == pytest.approx(profile.power.gap_watts, rel=0.2)
    for name in ("unshaped", "shaped"):
        measured = figures["runs"][name]
        assert measured["latency"]["requests_failed"] == 0
        assert measured["prediction"]["decodes_alone"]["median_absolute_ratio"] < 0.2
        assert (
            figures["virtual"][name]["requests_finished"]
            == (measured["latency"]["requests_finished"])
        )
    unshaped, shaped = (figures["runs"][name]["power"] for name in ("unshaped", "shaped"))
    assert shaped["peak_watts"] < 0.9 * unshaped["peak_watts"]
    assert figures["runs"]["shaped"]["reasons"]
    assert json.loads((tmp_path / "pack" / "meta.json").read_text())["emulated"] is True
    fitted = [sys.executable, "-m", "shaper", "fit", str(tmp_path / "recording.parquet"), "--json"]
    fit = subprocess.run(fitted, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert fit.returncode == 0, fit.stderr
    assert "memory.gemm_ratio" in fit.stdout
