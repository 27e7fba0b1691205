"""Recordings: what is written is read again; files as people have them are read, or refused in
one line."""

from __future__ import annotations

import gzip
import json
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from shaper.cli import main
from shaper.cli.replayed import take_replay
from shaper.config.model import build_config
from shaper.core.types import ClockEventReasons, GpuSample, StepBatch
from shaper.emulator.playback import PlaybackReader, recorded_readings
from shaper.errors import ConfigError, ShaperError, TraceError
from shaper.recording.format import (
    RecordedStep,
    Recording,
    RecordingWriter,
    finish_recordings,
    read_recording,
    recorded_meta,
)

CASES = Path(__file__).resolve().parents[1] / "cases" / "recordings"
META = {"gpu": "h200-sxm", "tensor_parallel": 1}
STEPS = (RecordedStep(1.0, 1.01, StepBatch(8, 8, 8000)),)
SAMPLES = tuple(
    GpuSample(1.0 + 0.02 * i, 0, instant_watts=400.0 + i, energy_joules=5.0 * i) for i in range(4)
)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.csv"
    writer = RecordingWriter(path, META)
    writer.write(STEPS, SAMPLES)
    writer.close()
    return path


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    """Every field survives, in both formats."""
    path = tmp_path / f"run{ending}"
    whole = RecordedStep(1.01, 1.05, StepBatch(8, 8, 8008, 1, 512, 512, 512 * 512, 512 * 512, 3))
    capped = replace(SAMPLES[0], clock_event_reasons=ClockEventReasons.SW_POWER_CAP)
    writer = RecordingWriter(path, META)
    writer.write(STEPS, [capped])
    writer.write([whole])
    writer.close()
    writer.close()
    assert read_recording(path) == Recording(META, (*STEPS, whole), (capped,))
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_engine_leaves_what_it_wrote(tmp_path: Path) -> None:
    """Without `close` all flushed rows are there, also for a Parquet recording."""
    writer = RecordingWriter(tmp_path / "run.parquet", META)
    writer.write(STEPS, SAMPLES)
    assert len(read_recording(tmp_path / "run.partial.csv").samples) == 4
    finish_recordings(tmp_path / "run.parquet")
    assert len(read_recording(tmp_path / "run.parquet").samples) == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "run.parquet"]
    writer.close()


@pytest.mark.parametrize("name", ["after_pandas.csv", "utf16.csv"])
def test_cases_are_read_as_the_plain_file(name: str) -> None:
    """By all that read one: the fit, the replayed GPU and the check before a start."""
    plain = read_recording(CASES / "bom.csv")
    assert plain.meta["gpu"] == "h200-sxm"
    assert len(plain.samples) > 5
    found = read_recording(CASES / name)
    assert found == plain
    assert recorded_readings(CASES / name) == recorded_readings(CASES / "bom.csv")
    options = Namespace(emulate=f"replay:{CASES / name}")
    take_replay(options, build_config({}))
    assert (options.emulate, options.replay) == ("h200-sxm", CASES / name)
    assert PlaybackReader(CASES / name, lambda: 0.0).read()[0].instant_watts == 115.0


@pytest.mark.parametrize("name", ["after_pandas.csv", "utf16.csv", "bom.csv"])
def test_the_fit_says_of_each_case_what_it_says_of_the_plain_file(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lacks the model, and with one it lacks steps."""
    assert main.main(["fit", str(CASES / name)]) == 2
    assert "give --model" in capsys.readouterr().err
    assert main.main(["fit", str(CASES / name), "--model", "llama-3.1-8b"]) == 2
    assert "0 steps with tokens" in capsys.readouterr().err


def excel(text: str) -> str:
    """Semicolons, and no empty cells at a row's end."""
    rows = text.splitlines()
    short = [row.replace(",", ";").rstrip(";") for row in rows[2:]]
    meta = "meta" + ";" * rows[0].count(",") + rows[1].lstrip("meta,")
    return "\n".join([rows[0].replace(",", ";"), meta, *short]) + "\n"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(lambda text: text.replace("\n", "\r"), id="CR"),
        pytest.param(lambda text: text.rstrip("\n"), id="no last line end"),
        pytest.param(excel, id="semicolons"),
        pytest.param(lambda text: text.replace("\n", "\n\n,,,\n"), id="blank lines"),
        pytest.param(lambda text: text.replace("\n", ",,\n"), id="trailing commas"),
        pytest.param(lambda text: text.replace("kind,start_s", "Kind,Start_S"), id="case"),
        pytest.param(lambda text: text.replace("\nsample,", '\n"sample" ,'), id="quoted"),
        pytest.param(lambda text: text + "sample,,,,,,", id="half a row"),
        pytest.param(lambda text: gzip.compress(text.encode()), id="gzip"),
        pytest.param(lambda text: ("\ufeff" + text).encode("utf-16-be"), id="UTF-16 BE"),
    ],
)
def test_usual_forms_are_read(plain: Path, change) -> None:
    """Whatever program wrote them again."""
    changed = change(plain.read_text())
    path = plain.with_name("changed.csv")
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    assert read_recording(path) == Recording(META, STEPS, SAMPLES)
    assert recorded_readings(path) == tuple((sample,) for sample in SAMPLES)
    assert recorded_meta(path) == META


def test_pandas_round_trips(plain: Path) -> None:
    """As CSV and as Parquet, where a column with a gap has become one of floats."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(plain)
    frame.to_csv(plain.with_name("again.csv"), index=True)
    frame.to_parquet(plain.with_name("again.parquet"))
    for name in ("again.csv", "again.parquet"):
        found = read_recording(plain.with_name(name))
        assert (found.meta, found.samples) == (META, SAMPLES)
        assert recorded_readings(plain.with_name(name)) == tuple((s,) for s in SAMPLES)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("step,2.0,1.0", "not after its start"),
        ("step,1.0,inf", "end_seconds is 'inf', not a number"),
        ("step,nan,2.0", "start_seconds is 'nan', no time"),
        ("step,1.0,", "end_seconds is empty"),
        ("step,1.0,2.0,-1", "decode_requests is '-1', below 0"),
        ("step,1.0,2.0,1.5", "decode_requests is '1.5', not a whole number"),
        ("step,1.0,2.0,1e300", "not a whole number"),
        ('step,1.0,2.0,"1,000"', "'1,000', not a number: write it with a point"),
        ("step,1.0,2.0,1_0", "not a number"),
        ("sample,,,,,,,,,,,,nan,0", "read_seconds is 'nan', no time"),
        ("sample,,,,,,,,,,,,9.0,nan", "gpu_index is empty"),
        ("sample,,,,,,,,,,,,9.0,-2", "gpu_index is '-2', below 0"),
        ("stp", "kind is 'stp'"),
        ("sample" + "," * 60 + "x", "61 columns|62 columns"),
        ('meta,,"{', "meta"),
        ("meta" + "," * 27 + "[1]", "no JSON object"),
        ("meta" + "," * 27 + '"' + "x" * 140_000 + '"', "a cell is over"),
        ("sample,,,,,\udce9", "not UTF-8"),
        ("sample,\0", "NUL"),
    ],
)
def test_a_wrong_row_is_named(plain: Path, row: str, says: str) -> None:
    """With the file and the row, in one line, by each reader that looks at it."""
    with plain.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(row + "\n")
    for read in (read_recording, recorded_readings):
        with pytest.raises(TraceError, match=says) as caught:
            read(plain)
        assert str(plain) in str(caught.value)
        assert " 8" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_what_is_no_recording_is_refused_by_all(tmp_path: Path, ending: str) -> None:
    """Empty, a directory, a pipe (which would be waited for), binary, another table."""
    files = {name: tmp_path / f"{name}{ending}" for name in ("empty", "binary", "table", "pipe")}
    files["empty"].write_bytes(b"")
    files["binary"].write_bytes(bytes(range(256)) * 20)
    files["table"].write_text("a,b\n1,2\n")
    os.mkfifo(files["pipe"])
    for path in (*files.values(), tmp_path, Path("/dev/zero")):
        for read in (read_recording, recorded_readings):
            with pytest.raises(TraceError, match=str(path)) as caught:
                read(path)
            assert "\n" not in str(caught.value)


def test_parquet_of_any_other_types_is_refused(tmp_path: Path) -> None:
    """Columns of lists, of times and of truth values are no measurement."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for index, column in enumerate(
        ([[1.0], [2.0]], [True, False], [b"1", b"2"], [{"a": 1}, {"a": 2}], ["x", "y"])
    ):
        path = tmp_path / f"{index}.parquet"
        table = pa.table({"kind": ["sample"] * 2, "read_seconds": column, "gpu_index": [0, 0]})
        pq.write_table(table, path)
        for read in (read_recording, recorded_readings):
            with pytest.raises(TraceError, match="row 1: read_seconds is"):
                read(path)


def test_parquet_without_pyarrow_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name on PyPI."""
    path = tmp_path / "run.parquet"
    path.write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for read in (read_recording, recorded_readings):
        with pytest.raises(ConfigError, match="pip install pyarrow"):
            read(path)


@pytest.mark.parametrize(
    "meta",
    [
        {"gpu": 5},
        {"gpu": "h200-sxm", "tensor_parallel": "two", "model_config": {}},
        {"gpu": "h200-sxm", "tensor_parallel": [1], "model_config": {"hidden_size": "a"}},
        {"gpu": "h200-sxm", "tensor_parallel": 0, "model_config": "llama-3.1-8b"},
    ],
)
def test_a_wrong_meta_row_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meta: dict[str, object]
) -> None:
    """What it says of the GPU, the model and their number is checked as a flag would be."""
    path = tmp_path / "run.csv"
    writer = RecordingWriter(path, meta)
    writer.write(STEPS * 60, SAMPLES)
    writer.close()
    for more in ([], ["--model", "llama-3.1-8b", "--json"]):
        assert main.main(["fit", str(path), *more]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    try:
        take_replay(Namespace(emulate=f"replay:{path}"), build_config({}))
    except ShaperError as error:
        assert "\n" not in json.dumps(str(error))  # noqa: PT017 - any of them is one line
