"""`shaper record` without a server: whole files, whatever ends it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shaper.cli import main
from shaper.cli.record import record
from shaper.core.types import GpuSample
from shaper.emulator.device import EmulatedDevice
from shaper.emulator.shapes import load_shape
from shaper.errors import GpuLostError, TraceError
from shaper.gpu.replay import ReplayReader
from shaper.recording.format import RecordingWriter, finish_rows, read_recording, recorded_meta

IDLE = ("--emulate", "h200-sxm", "--interval", "5ms")
SAMPLES = [GpuSample(1.0 + n, 0, instant_watts=400.0 + n) for n in range(50)]


class Faulty:
    """An idle emulated GPU of which every second read fails."""

    def __init__(self) -> None:
        self.inner = EmulatedDevice("h200-sxm", load_shape("llama-3.1-8b")).reader
        self.gpus = self.inner.gpus
        self.given: list[GpuSample] = []
        self.reads = 0
        self.closed = False

    def read(self):
        self.reads += 1
        if self.reads % 2:
            raise GpuLostError("gone")
        self.given.extend(self.inner.read())
        return (self.given[-1],)

    def close(self):
        self.closed = True


def test_what_was_read_is_what_is_played(tmp_path, capsys):
    """Every sample of every good read, in both formats; failed reads are counted and said."""
    for name in ("run.csv", "run.parquet"):
        reader = Faulty()
        assert (
            record(reader, RecordingWriter(tmp_path / name, {}), 0.3, 0.01, threading.Event()) == 0
        )
        assert "reads failed" in capsys.readouterr().out
        assert reader.closed
        assert reader.given
        replay = ReplayReader(tmp_path / name)
        assert [replay.read()[0] for _ in reader.given] == reader.given
        with pytest.raises(GpuLostError):
            replay.read()


def started(path: Path) -> subprocess.Popen[str]:
    """The command, once it has written rows."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shaper", "record", str(path), *IDLE, "--duration", "10min"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rows = path if path.suffix == ".csv" else path.with_suffix(".partial.csv")
    while not rows.exists() or rows.stat().st_size < 4000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("name", "how"), [("run.parquet", signal.SIGTERM), ("run.csv", signal.SIGINT)]
)
def test_a_signal_ends_it_with_a_whole_file(tmp_path, name, how):
    """The exit code is 0, and a second recorder of the same file was refused meanwhile."""
    process = started(tmp_path / name)
    assert main.main(["record", str(tmp_path / name), "--emulate", "h200-sxm"]) == 2
    process.send_signal(how)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    samples = read_recording(tmp_path / name).samples
    assert f"{len(samples)} rows" in said
    assert recorded_meta(tmp_path / name)["gpu"] == "h200-sxm"
    assert os.listdir(tmp_path) == [name]


def test_a_kill_leaves_rows_that_can_be_read_and_are_not_written_over(tmp_path, capsys):
    """Also those of a Parquet file; the next recorder says so and needs `--force`."""
    process = started(tmp_path / "run.parquet")
    process.kill()
    process.communicate(timeout=60)
    left = tmp_path / "run.partial.csv"
    before = read_recording(left).samples
    assert before
    again = [
        "record",
        str(tmp_path / "run.parquet"),
        "--emulate",
        "h200-sxm",
        "--duration",
        "100ms",
    ]
    assert main.main(again) == 2
    assert "run.partial.csv'; --force replaces it" in capsys.readouterr().err
    assert read_recording(left).samples == before
    assert main.main([*again, "--force"]) == 0
    assert not left.exists()


@pytest.mark.parametrize("name", ["run.csv", "run.parquet"])
def test_a_full_disk_keeps_the_rows_before_it(tmp_path, name):
    """One line says so; no row is half there."""
    limit = f"import resource; resource.setrlimit({resource.RLIMIT_FSIZE}, (20000, 20000)); "
    arguments = ["record", str(tmp_path / name), "--emulate", "h200-sxm", "--interval", "5ms"]
    done = subprocess.run(
        [sys.executable, "-c", f"{limit}from shaper.cli import main; exit(main.main({arguments}))"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the recording ends here: File too large" in line
    left = tmp_path / name.replace(".parquet", ".partial.csv")
    assert left.name in line
    samples = read_recording(left).samples
    assert f"{len(samples)} rows" in line
    assert len(samples) > 20


def test_half_a_row_at_the_end_is_none(tmp_path):
    """A kill in the middle of a write costs that row, in CSV and on the way to Parquet."""
    writer = RecordingWriter(tmp_path / "run.parquet", {})
    writer.write(samples=SAMPLES)
    writer.release()
    left = tmp_path / "run.partial.csv"
    left.write_text(left.read_text()[:-30])
    assert list(read_recording(left).samples) == SAMPLES[:-1]
    finish_rows(left)
    assert list(read_recording(tmp_path / "run.parquet").samples) == SAMPLES[:-1]


def test_parquet_is_not_written_over_something_else(tmp_path):
    """What came there meanwhile stays, and so do the rows."""
    writer = RecordingWriter(tmp_path / "run.parquet", {}, replace=False)
    writer.write(samples=SAMPLES)
    (tmp_path / "run.parquet").write_text("mine")
    with pytest.raises(TraceError, match=r"run\.partial\.csv, which can be read"):
        writer.close()
    assert (tmp_path / "run.parquet").read_text() == "mine"
    assert len(read_recording(tmp_path / "run.partial.csv").samples) == 50


def test_a_link_is_not_followed(tmp_path):
    """Neither by a new file nor by one that replaces."""
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "run.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(TraceError, match="exists"):
        RecordingWriter(tmp_path / "run.csv", {}, replace=False)
    RecordingWriter(tmp_path / "run.csv", {}, replace=True).close()
    assert (tmp_path / "secret").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run.txt", "--emulate", "h200-sxm"], "must end with .csv or .parquet"),
        (["no/run.csv", "--emulate", "h200-sxm"], "can't be written"),
        (["run.csv", "--emulate", "h900"], "h900"),
        (["run.csv", "--duration", "0s"], "--duration 0s"),
        (["run.csv", "--duration", "soon"], "--duration"),
        (["run.csv", "--interval", "1ms"], "outside 0.005 to 60"),
        (["run.csv", "--url", "http://127.0.0.1:1", "--force"], "exclude each other"),
        (["a/run.csv", "--url", "http://127.0.0.1:1"], "is a path"),
        (["run.csv", "--url", "http://127.0.0.1:1"], "no server answers"),
        (["run.csv", "--nosuch"], "--nosuch"),
        (["run.csv"], "add --emulate"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    """And no file is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHAPER_ADMIN_KEY", "an-admin-key-of-a-test")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main.main(["record", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert os.listdir(tmp_path) == []
