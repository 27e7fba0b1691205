"""`bench.gpu_serve`: plan, resume, what breaks, what no longer fits.

No server starts: runs are made by an emulated GPU in virtual time.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_serve
from bench.gpu_serving import idle, plan
from bench.gpu_serving.options import budgets
from bench.gpu_serving.plan import Run, parse_knobs, runs
from bench.gpu_serving.serve import EngineOptions, serve_arguments
from bench.gpu_serving.store import is_done, read_meta, read_run, read_settings
from bench.harness.servers import ServerError
from shaper.core.types import GpuIdentity, GpuSample, PowerLimit
from shaper.errors import ConfigError, TraceError
from tests.bench.gpu_serve_fakes import write_emulated_run

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("unshaped", "shaped-85", "shaped-70", "static", "shaped-85-itl", "shaped-70-itl")


class FakeServe:
    """Stands for `serve_run`: makes runs from an emulated GPU, and can break."""

    def __init__(self) -> None:
        self.limits: dict[str, PowerLimit | None] = {}
        self.broken: set[str] = set()
        self.failed_requests = 0

    def __call__(
        self,
        settings: Any,
        run: Run,
        limit: PowerLimit | None,
        engine: EngineOptions,
        folder: Path,
        left_seconds: Any,
        say: Any,
    ) -> None:
        self.limits[run.name] = limit
        if run.name in self.broken:
            raise ServerError("the server ended with exit code 1")
        if run.name == "unshaped" and "interrupt" in self.broken:
            raise KeyboardInterrupt
        write_emulated_run(folder, run, limit, failed=self.failed_requests)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake = FakeServe()
    monkeypatch.setattr(gpu_serve, "serve_run", fake)
    return fake


def command(out: Path, *arguments: str) -> int:
    return gpu_serve.main(["--out", str(out), "--emulate", "h200-sxm", "--quick", *arguments])


def test_the_plan_has_each_run_once():
    """Unshaped first, then by what would be missed most; limits are shares of the peak."""
    found = runs((0.85, 0.7), 0.05, (2048, 64))
    assert tuple(run.name for run in found) == NAMES
    assert found[1].limit(700.0) == PowerLimit(595.0, 0.1)
    assert found[0].limit(700.0) is None
    assert (found[3].max_num_batched_tokens, found[3].max_num_seqs) == (2048, 64)
    assert [run.itl_target_seconds for run in found] == [None, None, None, None, 0.05, 0.05]


@pytest.mark.parametrize("text", ["", "2048", "0x0", "64x2048", "ax1", "2048x64x1", "-1x1"])
def test_static_knobs_that_vllm_would_refuse(text):
    """No server is started for them."""
    with pytest.raises(ConfigError, match="--static"):
        parse_knobs(text)


@pytest.mark.parametrize("text", ["", "none", "1.0", "0.1", "nan", "0.9,0.8,0.7"])
def test_budgets_out_of_range(text):
    """A budget is a share of the peak, and there are two at most."""
    with pytest.raises(ConfigError, match="--budgets"):
        budgets(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "shaped-99"], "shaped-99"),
        (["--stage"], "--stage"),
        (["--rate", "0"], "--rate"),
        (["--profile", "h900"], "h900"),
        (["--model", "nothing"], "nothing"),
        (["--itl-target", "20"], "--itl-target"),
        (["--max-model-len", "100"], "--max-model-len"),
        (["--trace", "no-such.csv"], "no-such.csv"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, capsys, served):
    """Code 2, and nothing is left in the folder."""
    assert command(tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not served.limits
    assert not list((tmp_path / "out").glob("*"))


def test_a_whole_comparison_and_its_report(tmp_path, served, capsys):
    """All runs, then report and table, which say that all of it is emulated; a second call
    does nothing again, and a run that is asked for by name is made anew."""
    assert command(tmp_path, "--stage", "serve", "report") == 0
    assert tuple(served.limits) == NAMES
    peak = json.loads((tmp_path / "figures.json").read_text())["runs"]["unshaped"]["power"]
    limit = served.limits["shaped-85-itl"]
    assert limit is not None
    assert limit.watts == pytest.approx(0.85 * peak["peak_watts"], abs=0.1)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "emulated h200-sxm" in page
    assert "not measured" in page
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("# Shaper under real traffic on emulated h200-sxm")
    assert all(name in table for name in NAMES)
    assert "| " in table
    served.limits.clear()
    assert command(tmp_path, "--stage", "serve") == 0
    assert not served.limits
    assert "done before" in capsys.readouterr().out
    assert command(tmp_path, "--stage", "static") == 0
    assert list(served.limits) == ["static"]


def test_a_broken_stage_costs_only_itself(tmp_path, served, capsys):
    """The others are made and reported; the next call makes what is missing."""
    served.broken = {"shaped-85", "static"}
    assert command(tmp_path, "--stage", "serve", "report") == 1
    error = capsys.readouterr().err
    assert "shaped-85: the server ended" in error
    assert [name for name in NAMES if is_done(tmp_path / name)] == [
        name for name in NAMES if name not in served.broken
    ]
    assert (tmp_path / "report.html").exists()
    served.broken.clear()
    served.limits.clear()
    assert command(tmp_path, "--stage", "serve") == 0
    assert list(served.limits) == ["shaped-85", "static"]


def test_without_the_unshaped_peak_nothing_is_shaped(tmp_path, served, capsys):
    """Shaped runs name what they need; the static run needs nothing."""
    served.broken = {"unshaped"}
    assert command(tmp_path, "--stage", "serve") == 1
    assert list(served.limits) == ["unshaped", "static"]
    assert "run --stage unshaped" in capsys.readouterr().err


def test_an_interrupt_keeps_finished_runs(tmp_path, served):
    """Code 130, and the folder's settings are there for the next call."""
    served.broken = {"interrupt"}
    assert command(tmp_path, "--stage", "serve") == 130
    assert read_settings(tmp_path) is not None
    assert not is_done(tmp_path / "unshaped")


def test_what_no_longer_fits_is_skipped_and_said(tmp_path, served, capsys):
    """A run that would end after the bound is not started; the exit code tells."""
    assert command(tmp_path, "--stage", "serve", "report", "--total-seconds", "30") == 1
    printed = capsys.readouterr()
    assert not served.limits
    assert "don't fit the" in printed.err
    assert "static: skipped" in printed.out


def test_failed_requests_are_told(tmp_path, served, capsys):
    """They are figures too, and the exit code is not 0."""
    served.failed_requests = 2
    assert command(tmp_path, "--stage", "unshaped") == 1
    assert "2 requests failed: HTTP 500" in capsys.readouterr().err


def test_a_folder_keeps_to_its_traffic(tmp_path, served, capsys):
    """Other traffic, another GPU or other runs in the same folder are refused."""
    assert command(tmp_path, "--stage", "unshaped", "--rate", "5") == 0
    first = read_settings(tmp_path)
    assert command(tmp_path, "--stage", "static", "--rate", "6") == 2
    assert "--rate" in capsys.readouterr().err
    assert command(tmp_path, "--stage", "static", "--emulate", "h100-sxm") == 2
    assert "emulated h200-sxm" in capsys.readouterr().err
    assert gpu_serve.main(["--out", str(tmp_path), "--stage", "static"]) == 0
    assert read_settings(tmp_path) == first


def test_settings_of_another_version_are_one_line(tmp_path, served, capsys):
    """A file that lacks something is named, and so is one that is cut off."""
    path = tmp_path / "settings.json"
    for text in ("{}", '{"emulate": nul'):
        path.write_text(text)
        assert command(tmp_path, "--stage", "report") == 2
        assert "settings.json" in capsys.readouterr().err


def test_a_run_comes_back_as_it_was_written(tmp_path):
    """Meta, requests and steps survive the folder; a run that is not finished is an error."""
    run = Run("shaped-85", budget_ratio=0.85, itl_target_seconds=0.05)
    meta = write_emulated_run(tmp_path / "run", run, PowerLimit(500.0, 0.1), seconds=2.0)
    assert read_meta(tmp_path / "run") == meta
    stored = read_run(tmp_path / "run")
    assert len(stored.replay.records) == 10
    assert stored.replay.records[3].request.prompt_tokens == 512
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(TraceError, match=r"run\.json"):
        read_run(tmp_path / "run")


def test_what_vllm_is_told(tmp_path):
    """Real: dummy weights of a directory, the backend, eager mode; emulated: none of these."""
    # The unshaped run does not fit, and the settings are kept.
    assert command(tmp_path, "--stage", "unshaped", "--total-seconds", "1") == 1
    settings = read_settings(tmp_path)
    assert settings is not None
    run = settings.runs[-1]
    engine = EngineOptions("TRITON_ATTN", enforce_eager=True)
    limit = run.limit(700.0)
    emulated = serve_arguments(settings, run, limit, engine, 8123)
    assert emulated[0] == "llama-3.1-8b"
    assert "--load-format" not in emulated
    real = serve_arguments(dataclasses.replace(settings, emulate=None), run, limit, engine, 8123)
    assert (Path(real[0]) / "config.json").is_file()
    words = " ".join(real)
    for part in (
        *("--load-format dummy", "--attention-backend TRITON_ATTN", "--enforce-eager"),
        *("--host 127.0.0.1", "--power-limit 490.0W@100ms", "--itl-target 50ms"),
    ):
        assert part in words
    assert "--emulate" not in words


class FakeReader:
    """A GPU at rest, or not."""

    def __init__(self, watts: float) -> None:
        self.gpus = (GpuIdentity(0, "NVIDIA H200", "GPU-a", 700.0),)
        self.watts = watts
        self.closed = False

    def read(self) -> tuple[GpuSample, ...]:
        return (GpuSample(0.0, 0, instant_watts=self.watts, temperature_celsius=31.0),)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("watts", "driver", "objection"),
    [
        (78.0, {}, ""),
        (78.0, {"processes": (4711,)}, "4711"),
        (78.0, {"memory_used_bytes": 9 * 2**30}, "9.0 GiB"),
        (160.0, {}, "160 W"),
    ],
)
def test_a_gpu_that_is_not_idle_is_refused(
    watts, driver, objection, tmp_path, served, monkeypatch, capsys
):
    """Unless --force is given; what it looked like is kept in either case."""
    reader = FakeReader(watts)
    monkeypatch.setattr(idle, "open_gpu", lambda: reader)
    monkeypatch.setattr(idle, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(idle, "_driver", lambda index: {"driver": "580.1", **driver})
    code = gpu_serve.main(["--out", str(tmp_path), "--quick", "--stage", "unshaped"])
    assert reader.closed
    state = json.loads((tmp_path / "gpu.json").read_text())
    assert state["driver"] == "580.1"
    assert state["idle_watts"] == watts
    if not objection:
        assert code == 0
        return
    assert code == 2
    assert objection in capsys.readouterr().err
    assert not served.limits
    assert not (tmp_path / "settings.json").exists()
    forced = ["--out", str(tmp_path), "--quick", "--stage", "unshaped", "--force"]
    assert gpu_serve.main(forced) == 0


def test_what_a_driver_does_not_say_is_left_out(monkeypatch):
    """Getters alone are called; one that this driver refuses costs its own field."""

    class RefusedError(Exception):
        pass

    def refuse(handle: object) -> None:
        raise RefusedError

    driver = SimpleNamespace(
        NVMLError=RefusedError,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5),
        nvmlDeviceGetPowerManagementDefaultLimit=refuse,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=7)],
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert idle._driver(0) == {"driver": "580.1", "memory_used_bytes": 5, "processes": (7,)}


def test_the_time_for_a_start_leaves_room_for_the_traffic():
    """A server that starts too late is given up before its traffic would break the bound."""
    timeout = plan.start_timeout_seconds(300.0, 6.0, 60.0)
    assert timeout + plan.expected_seconds(0.0, 6.0, 60.0) == pytest.approx(300.0)
