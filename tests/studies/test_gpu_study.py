"""`bench.studies.gpu` as it is called: wrong input, resume, what breaks, what no longer fits.

No engine and no server start: an emulated GPU takes their place.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from bench.harness.servers import ServerError
from bench.studies.gpu import __main__ as study
from bench.studies.gpu import process, rest, stages
from bench.studies.gpu.engine import EngineSettings
from bench.studies.gpu.plan import DEFAULT_STAGES, RUNS, Run
from bench.studies.gpu.serve import serve_arguments
from bench.studies.gpu.store import Settings, is_done, read_json, read_run, read_settings
from shaper.core.types import GpuIdentity, GpuSample, PowerLimit
from shaper.errors import EngineError, TraceError
from shaper.gpu import nvml_driver
from shaper.recording.format import read_recording
from tests.gpu.fake_nvml import FakeGpu, FakeNvml
from tests.studies.gpu_fakes import GPU, TINY, BareEngine, write_emulated_run

SERVERS = "unshaped,shaped,static"


class Fakes:
    """Stands for the engine's process and the servers: they can break."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.limits: dict[str, PowerLimit | None] = {}
        self.broken: set[str] = set()
        self.failed_requests = 0

    def run_apart(self, job: process.EngineJob) -> int:
        self.asked += job.stages
        process.run_stages(dataclasses.replace(job, plan=TINY), BareEngine)
        return 0

    def serve_run(
        self,
        settings: Any,
        run: Run,
        limit: PowerLimit | None,
        engine: EngineSettings,
        folder: Path,
        budget: Any,
        say: Any,
    ) -> None:
        self.asked.append(run.name)
        self.limits[run.name] = limit
        if run.name in self.broken:
            raise ServerError("the server ended with exit code 1")
        if "interrupt" in self.broken:
            raise KeyboardInterrupt
        write_emulated_run(folder, run, limit, seconds=3.0, failed=self.failed_requests)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fake = Fakes()
    monkeypatch.setattr(study, "run_apart", fake.run_apart)
    monkeypatch.setattr(study, "serve_run", fake.serve_run)
    return fake


def command(out: Path, *arguments: str) -> int:
    return study.main(["--out", str(out), "--emulate", GPU, "--quick", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "gap,sleep"], "sleep"),
        (["--stages"], "--stages"),
        (["--minutes", "0"], "--minutes"),
        (["--rate", "0"], "--rate"),
        (["--profile", "h900"], "h900"),
        (["--model", "nothing"], "nothing"),
        (["--emulate", "h300"], "h300"),
        (["--gpu-memory-utilization", "3"], "up to 2"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, capsys, fakes):
    """Code 2, and nothing is left in the folder."""
    assert command(tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not fakes.asked
    assert not list((tmp_path / "out").glob("*"))


def test_a_whole_study_and_its_report(tmp_path, fakes, capsys):
    """All stages in order, then the report, which says that all of it is emulated; a second
    call does nothing again but the report."""
    assert command(tmp_path, "--pack", str(tmp_path / "pack")) == 0
    assert tuple(fakes.asked) == DEFAULT_STAGES
    figures = json.loads((tmp_path / "figures.json").read_text())
    peak = figures["runs"]["unshaped"]["power"]["peak_watts"]
    limit = fakes.limits["shaped"]
    assert limit is not None
    assert limit.watts == pytest.approx(0.7 * peak, abs=0.1)
    assert {each["when"] for each in figures["between_steps"]} == {"cold", "hot"}
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "not measured" in page
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# The study of emulated h200-sxm")
    assert all(word in summary for word in ("## Gap", "W between steps", "shaped", "MHz"))
    joined = read_recording(tmp_path / "recording.parquet")
    parts = [read_recording(tmp_path / name / "recording.parquet") for name in DEFAULT_STAGES[:4]]
    assert len(joined.steps) == sum(len(part.steps) for part in parts)
    packed = {path.stem for path in (tmp_path / "pack").glob("*.parquet")}
    assert packed == set(DEFAULT_STAGES)
    fakes.asked.clear()
    assert command(tmp_path) == 0
    assert not fakes.asked
    assert "gap: done before" in capsys.readouterr().out


def test_what_no_longer_fits_is_skipped_and_done_by_the_next_call(tmp_path, fakes, capsys):
    """With two seconds in all, most points are left out, and each is named."""
    assert command(tmp_path, "--minutes", "0.04") == 1
    printed = capsys.readouterr()
    assert "prefill: not all of it fitted" in printed.err
    assert "unshaped: skipped" in printed.err
    assert "don't fit the time left" in printed.out
    assert "- skipped: prefill" in (tmp_path / "summary.md").read_text()
    fakes.asked.clear()
    assert command(tmp_path, "--stages", "prefill") == 0
    assert fakes.asked == ["prefill"]


def test_an_interrupted_stage_keeps_its_points(tmp_path, monkeypatch):
    """And is not done: the next call does it again."""
    job = process.EngineJob(tmp_path, ("decode",), EngineSettings(emulate=GPU), TINY, float("inf"))

    def interrupted(session: Any) -> None:
        session.measure({}, lambda: None, "before")
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.STAGES, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.run_stages(job, BareEngine)
    assert not is_done(tmp_path / "decode")
    assert len(read_json(tmp_path / "decode" / "stage.json")["points"]) == 1
    assert read_recording(tmp_path / "decode" / "recording.parquet").meta["gpu"] == GPU


def test_an_engine_that_does_not_start_costs_no_server(tmp_path, monkeypatch, fakes, capsys):
    """Its process ends with a line; the servers are tried all the same."""
    monkeypatch.setattr(study, "run_apart", lambda job: 2)
    assert command(tmp_path, "--stages", "gap,unshaped") == 1
    assert "gap: the engine's process broke" in capsys.readouterr().err
    assert is_done(tmp_path / "unshaped")


def test_a_broken_server_costs_only_itself(tmp_path, fakes, capsys):
    """The others are made and reported; the next call makes what is missing."""
    fakes.broken = {"shaped"}
    assert command(tmp_path, "--stages", SERVERS) == 1
    assert "shaped: the server ended" in capsys.readouterr().err
    assert (tmp_path / "report.html").exists()
    fakes.broken.clear()
    fakes.asked.clear()
    assert command(tmp_path, "--stages", SERVERS) == 0
    assert fakes.asked == ["shaped"]


def test_without_the_unshaped_peak_nothing_is_shaped(tmp_path, fakes, capsys):
    """Shaped runs name what they need; the static run needs nothing."""
    fakes.broken = {"unshaped"}
    assert command(tmp_path, "--stages", SERVERS) == 1
    assert fakes.asked == ["unshaped", "static"]
    assert "run --stages unshaped" in capsys.readouterr().err


def test_an_interrupt_keeps_finished_runs(tmp_path, fakes):
    """Code 130, and the folder's settings are there for the next call."""
    fakes.broken = {"interrupt"}
    assert command(tmp_path, "--stages", SERVERS) == 130
    assert read_settings(tmp_path) is not None
    assert not is_done(tmp_path / "unshaped")


def test_failed_requests_are_told(tmp_path, fakes, capsys):
    """They are figures too, and the exit code is not 0."""
    fakes.failed_requests = 2
    assert command(tmp_path, "--stages", "unshaped") == 1
    assert "2 requests failed: HTTP 500" in capsys.readouterr().err


def test_a_folder_keeps_to_its_settings(tmp_path, fakes, capsys):
    """Other traffic or another GPU in the same folder is refused; a broken file is named."""
    assert command(tmp_path, "--stages", "unshaped", "--rate", "5") == 0
    assert command(tmp_path, "--stages", "static", "--rate", "6") == 2
    assert "--rate" in capsys.readouterr().err
    assert study.main(["--out", str(tmp_path), "--emulate", "h100-sxm"]) == 2
    assert "emulated h200-sxm" in capsys.readouterr().err
    assert study.main(["--out", str(tmp_path), "--stages", "static"]) == 0
    for text in ("{}", '{"emulate": nul'):
        (tmp_path / "settings.json").write_text(text)
        assert command(tmp_path, "--stages", "static") == 2
        assert "settings.json" in capsys.readouterr().err


def test_a_run_comes_back_as_it_was_written(tmp_path):
    """Meta and requests survive the folder; a run that is not finished is an error."""
    write_emulated_run(tmp_path / "run", RUNS["shaped"], PowerLimit(500.0, 0.1), seconds=2.0)
    meta, replay = read_run(tmp_path / "run")
    assert meta.run == RUNS["shaped"]
    assert meta.limit == PowerLimit(500.0, 0.1)
    assert len(replay.records) == 10
    assert replay.records[3].request.prompt_tokens == 512
    (tmp_path / "run" / "stage.json").unlink()
    with pytest.raises(TraceError, match=r"stage\.json"):
        read_run(tmp_path / "run")


def test_what_vllm_is_told():
    """Real: dummy weights of a directory, the backend, eager mode; emulated: none of these."""
    emulated = Settings(GPU, "llama-3.1-8b", 6.0, 3.0, 2.0)
    engine = EngineSettings(attention_backend="TRITON_ATTN", enforce_eager=True)
    run, limit = RUNS["shaped"], RUNS["shaped"].limit(700.0)
    found = serve_arguments(emulated, run, limit, engine, 8123)
    assert found[0] == "llama-3.1-8b"
    assert "--load-format" not in found
    real = serve_arguments(dataclasses.replace(emulated, emulate=None), run, limit, engine, 8123)
    assert (Path(real[0]) / "config.json").is_file()
    words = " ".join(real)
    for part in (
        *("--load-format dummy", "--attention-backend TRITON_ATTN", "--enforce-eager"),
        *("--host 127.0.0.1", "--power-limit 490.0W@100ms", "--itl-target 50ms"),
    ):
        assert part in words
    assert "--emulate" not in words


# A real GPU.


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
    ("watts", "users", "objection"),
    [
        (78.0, (None, []), ""),
        (78.0, (None, [4711]), "4711"),
        (78.0, (9 * 2**30, []), "9.0 GiB"),
        (160.0, (None, []), "160 W"),
    ],
)
def test_a_gpu_that_is_not_idle_is_refused(
    watts, users, objection, tmp_path, fakes, monkeypatch, capsys
):
    """Unless --force is given; what it looked like is kept in either case."""
    reader = FakeReader(watts)
    monkeypatch.setattr(rest, "open_gpu", lambda: reader)
    monkeypatch.setattr(rest, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(rest, "_users", lambda index: users)
    arguments = ["--out", str(tmp_path), "--quick", "--stages", "unshaped"]
    code = study.main(arguments)
    assert reader.closed
    assert read_json(tmp_path / "gpu.json")["idle_watts"] == watts
    if not objection:
        assert code == 0
        return
    assert code == 2
    assert objection in capsys.readouterr().err
    assert not fakes.asked
    assert not (tmp_path / "settings.json").exists()
    assert study.main([*arguments, "--force"]) == 0


class CountingNvml(FakeNvml):
    """A driver that notes everything that is asked of it."""

    def __init__(self, device: FakeGpu) -> None:
        super().__init__([device])
        self.asked: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            super().__getattribute__("asked").add(name)
        return super().__getattribute__(name)


def test_a_real_gpu_is_only_read(monkeypatch, tmp_path):
    """A look and all the engine's stages over a fake driver: no setter is called."""
    fake = CountingNvml(FakeGpu("GPU-a"))
    monkeypatch.setattr(nvml_driver, "pynvml", fake)
    monkeypatch.setattr(rest, "WATCH_SECONDS", 0.1)
    reader = rest.open_gpu()
    assert rest.look(reader)["name"]
    reader.close()
    job = process.EngineJob(tmp_path, ("gap", "cap"), EngineSettings(), TINY, float("inf"))
    process.run_stages(job, BareEngine)
    getters = {name for name in fake.asked if name.startswith("nvmlDevice")}
    assert getters
    assert all(name.startswith("nvmlDeviceGet") for name in getters), getters
    assert fake.open_count == 0
    assert read_json(tmp_path / "cap" / "stage.json")["findings"]["power_cap"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    """One line, and code 2."""
    missing = FakeNvml([], init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(nvml_driver, "pynvml", missing)
    assert study.main(["--out", str(tmp_path)]) == 2
    assert "NVIDIA driver" in capsys.readouterr().err


def test_an_engine_that_does_not_start_names_the_cause(monkeypatch):
    """And what to try."""
    pytest.importorskip("vllm")
    from bench.studies.gpu import engine

    def broken(settings: EngineSettings) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(engine, "set_environment", lambda emulate: None)
    monkeypatch.setattr(engine, "_start", broken)
    with pytest.raises(EngineError, match=r"no kernel image\); try --attention-backend"):
        engine.EngineRunner(EngineSettings(), SimpleNamespace())
