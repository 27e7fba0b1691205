"""Traces as people have them: each is taken right, or refused in one line that says what to do."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from pathlib import Path

import pytest

from bench.harness.options import recorded_workload
from bench.studies.summarise import main as summarise_main
from shaper.cli import main
from shaper.errors import TraceError
from shaper.traffic import traces
from shaper.traffic.traces import TraceFormat, load_trace
from shaper.traffic.workload import Workload

CASES = Path(__file__).resolve().parent.parent / "cases" / "traces"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = "2023-11-16 18:15:46.5,374,44\n2023-11-16 18:15:47.5,396,109\n"
BURST_HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
RIGHT = [(0.0, 374, 44), (1.0, 396, 109)]


def facts(load: Workload) -> list[tuple[float, int, int]]:
    return [(round(r.arrival_seconds, 5), r.prompt_tokens, r.output_tokens) for r in load.requests]


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "trace.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "trace_format", "right", "left_out"),
    [
        ("azure_2024.csv", "auto", [(0.0, 2162, 5), (0.99007, 76, 15)], 0),
        ("azure_z.csv", "auto", [(0.0, 10, 5), (0.5, 76, 15)], 0),
        ("azure_cr_line_ends.csv", "auto", [(0.0, 374, 44)], 0),
        ("azure_one_empty_answer.csv", "auto", [(0.0, 374, 44)], 1),
        ("mooncake_without_hash_ids.jsonl", "mooncake", [(0.0, 300, 40), (1.5, 320, 44)], 0),
        ("timed_short_first_prompt.jsonl", "auto", [(0.0, 10, 4), (1.5, 32, 4)], 0),
        ("burstgpt_like.csv", "auto", [(0.0, 472, 18)], 1),
    ],
)
def test_cases_are_taken(
    name: str, trace_format: TraceFormat, right: list[tuple[float, int, int]], left_out: int
) -> None:
    """With their times and lengths; what is left out is counted, in the name that reports show."""
    load = load_trace(CASES / name, trace_format)
    assert facts(load) == right
    assert (f"{left_out} without a prompt or an answer" in load.name) == bool(left_out)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("mooncake_without_hash_ids.jsonl", ("--format mooncake", "timed")),
        ("array_of_requests.json", ("array", "azure", "burstgpt", "mooncake", "timed")),
    ],
)
def test_cases_are_refused(
    capsys: pytest.CaptureFixture[str], name: str, names: tuple[str, ...]
) -> None:
    """By the command, in one line with the formats to choose from."""
    assert main.main(["simulate", "--trace", str(CASES / name)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(each in line for each in (name, *names)), line


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(HEADER + ROWS, id="plain"),
        pytest.param((HEADER + ROWS).replace(",", ";"), id="semicolons"),
        pytest.param((HEADER + ROWS).replace(",", "\t"), id="tabs"),
        pytest.param((HEADER + ROWS).replace("\n", "\r\n"), id="CRLF"),
        pytest.param((HEADER + ROWS).replace("\n", "\r"), id="CR"),
        pytest.param((HEADER + ROWS).rstrip("\n"), id="no last line end"),
        pytest.param("\ufeff" + HEADER + ROWS, id="mark"),
        pytest.param((HEADER + ROWS).encode("utf-16"), id="UTF-16"),
        pytest.param(codecs.BOM_UTF16_BE + (HEADER + ROWS).encode("utf-16-be"), id="UTF-16 BE"),
        pytest.param(gzip.compress((HEADER + ROWS).encode()), id="gzip"),
        pytest.param("\n\n" + HEADER + "\n" + ROWS + "\n , ,\n", id="blank lines"),
        pytest.param(HEADER + ROWS.replace("\n", ",,\n"), id="trailing commas"),
        pytest.param((HEADER + ROWS).replace("\n", ",\n"), id="trailing commas of all"),
        pytest.param(HEADER.lower() + ROWS, id="lower case"),
        pytest.param("timestamp, context_tokens, generated_tokens\n" + ROWS, id="names"),
        pytest.param(HEADER + ROWS.replace(",", ', "').replace(', "4', '", "4').replace(
            ', "1', '", "1').replace("\n", '"\n'), id="quoted"),
        pytest.param(HEADER + ROWS.replace("374", "374.0").replace("109", "1.09e2"), id="floats"),
        pytest.param("GeneratedTokens,TIMESTAMP,ContextTokens\n44,2023-11-16 18:15:46,374\n"
                     "109,2023-11-16 18:15:47,396\n", id="columns in another order"),
        pytest.param(HEADER + ROWS.splitlines()[1] + "\n" + ROWS.splitlines()[0], id="unsorted"),
        pytest.param(HEADER + "2023-11-16 18:15:46.5+00:00,374,44\n"
                     "2023-11-16 20:15:47.5+02:00,396,109", id="two zones"),
        pytest.param(BURST_HEADER + "5,ChatGPT,374,44,418,Conversation log\n"
                     "6.0,GPT-4,396,109,505,API log\n", id="BurstGPT"),
        pytest.param("Timestamp,Request tokens,Response tokens\n5,374,44\n6,396,109\n",
                     id="BurstGPT, least columns"),
        pytest.param("Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,"
                     "Total tokens,Log Type\n5,,1.5,a,374,44,418,x\n6,s,2,a,396,109,505\n",
                     id="BurstGPT, more columns"),
        pytest.param('{"timestamp": -1000, "input_length": 374, "output_length": 44.0, '
                     '"hash_ids": [1]}\n\n{"timestamp": 0, "input_length": 396, '
                     '"output_length": 109}', id="Mooncake before 0"),
    ],
)  # fmt: skip
def test_usual_forms_are_taken(tmp_path: Path, content: str | bytes) -> None:
    """Whatever program wrote them."""
    assert facts(load_trace(written(tmp_path, content))) == RIGHT


def json_line(timestamp: object, tokens: object = 374, ids: object = (1,)) -> str:
    record = {"timestamp": timestamp, "input_length": tokens, "output_length": 4, "hash_ids": ids}
    return json.dumps(record) + "\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        (HEADER, "holds no request"),
        (HEADER + "2023-11-16 18:15:46,374,0\n", "holds no request: 1 have no prompt"),
        ("a,b,c\n1,2,3\n", "line 1: not the header of a trace; taken are azure.*burstgpt.*timed"),
        ("just words\n", "line 1: not the header"),
        ("TIMESTAMP,TIMESTAMP,ContextTokens,GeneratedTokens\n", "'TIMESTAMP' is named twice"),
        ("[\n{}]\n", "line 1: a JSON array.*taken are azure.*mooncake"),
        ("{\n", "line 1: not JSON.*taken are azure"),
        ('{"a": 1}\n', "line 1: no key 'input_length'; taken are"),
        ("[" * 100_000, "line 1: a JSON array"),
        ('{"a":' + "[" * 100_000, "line 1: not JSON"),
        (json_line(0, ids=[1, 2, 3]), "line 1: 3 hash_ids.*has 1 in .* mooncake and 24 in .*timed"),
        (json_line(10**400), "line 1: timestamp 1000.* is not finite"),
        (json_line(1e300), "is no time in milliseconds"),
        (json_line("0"), "timestamp '0' is not a number"),
        (json_line(True), "timestamp True is not a number"),
        (json_line(1715299200), "looks like seconds since 1970.*milliseconds"),
        (json_line(1715299200000, ids=[1] * 24), "looks like milliseconds since 1970"),
        (json_line(1715299200000000), "looks like microseconds since 1970"),
        (json_line(0, tokens=float("nan")), "input_length nan is not a whole number"),
        (json_line(0, tokens=-1), "input_length -1 is not within"),
        (json_line(0, tokens="374"), "input_length '374' is not a whole number"),
        (HEADER + '2023-11-16 18:15:46,"1,374",44\n', "line 2: .*without thousands separators"),
        (HEADER + "2023-11-16 18:15:46,1_374,44\n", "line 2: ContextTokens '1_374'"),
        (HEADER + "2023-11-16 18:15:46,nan,44\n", "line 2: ContextTokens 'nan'"),
        (HEADER + "2023-11-16 18:15:46,inf,44\n", "line 2: ContextTokens 'inf'"),
        (HEADER + "2023-11-16 18:15:46,,44\n", "line 2: ContextTokens ''"),
        (HEADER + "2023-11-16 18:15:46,37.5,44\n", "line 2: ContextTokens '37.5'"),
        (HEADER + "2023-11-16 18:15:46,1e30,44\n", "line 2: ContextTokens '1e30'"),
        (HEADER + "nan,374,44\n", "line 2: TIMESTAMP 'nan' is no time"),
        (HEADER + ROWS + "2023-11-16 18:15:48Z,3,4\n", "line 4: .* has a time zone"),
        (HEADER + "2023-11-16 18:15:46Z,3,4\n2023-11-16 18:15:48,3,4\n", "line 3: .* no time zone"),
        (HEADER + "2023-11-16 18:15:46,1,2,3\n", "line 2: 4 columns, the header has 3"),
        (HEADER + '"2023-11-16' + "x" * 200_000, "a cell is over 131,072 characters.*quote"),
        (HEADER + "x" * 5_000_000, "line 2: over 4 MiB long"),
        (HEADER + "2023\0,1,2\n", "line 2: holds a NUL byte"),
        ((HEADER + ROWS).encode("utf-16-le"), "line 1: holds a NUL byte.*UTF-8"),
        (HEADER.encode() + b"2023-11-16,1,2\xe9\n", "line 2: not UTF-8"),
        (codecs.BOM_UTF16_LE + b"\0\xd8\0\0", "not UTF-16 text"),
        (gzip.compress(HEADER.encode(), mtime=0)[:20], "can't be read"),
        (b"\x1f\x8b garbage", "can't be read"),
        (b"PK\x03\x04.....", "packed with zip: unpack it"),
        (BURST_HEADER + "1715299200000,a,3,4,7,x\n", "looks like milliseconds"),
        (BURST_HEADER + "five,a,3,4,7,x\n", "line 2: Timestamp 'five'"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, content: str | bytes, says: str) -> None:
    """With the file, and where one is at fault, the line."""
    path = written(tmp_path, content)
    with pytest.raises(TraceError, match=says) as caught:
        load_trace(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 700


def test_what_is_no_file_of_text_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path / "pipe", "is a pipe"),
        (tmp_path, "directory"),
        (Path("/dev/zero"), "device"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(TraceError, match=says):
            load_trace(path)


def test_a_long_trace_is_read_as_far_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rest may be of any length, and even broken; the part that arrives is the same."""
    monkeypatch.setattr(traces, "WHOLE_REQUESTS", 50)
    monkeypatch.setattr(traces, "MAX_REQUESTS", 3000)
    rows = [f"{n / 10},{n % 7 + 1},2" for n in range(5000)]
    rows[20], rows[25] = rows[25], rows[20]
    path = written(tmp_path, "Timestamp,Request tokens,Response tokens\n" + "\n".join(rows))
    with pytest.raises(TraceError, match=r"more than 3000 requests; give a --duration"):
        load_trace(path)
    with pytest.raises(TraceError, match="give a shorter --duration"):
        load_trace(path, seconds=1000.0)
    load = load_trace(path, seconds=20.0)
    assert "its first 200 requests" in load.name
    assert facts(load) == [(n / 10, n % 7 + 1, 2) for n in range(200)]
    part = recorded_workload(path, "auto", 0, None, 20.0)
    assert part.requests == load.requests
    fast = recorded_workload(path, "auto", 0, 20.0, 8.0)
    assert len(fast.requests) == 160
    # A short one is whole, whatever is asked for: it may go on with its start.
    short = written(tmp_path, "Timestamp,Request tokens,Response tokens\n" + "\n".join(rows[:50]))
    assert len(load_trace(short, seconds=1.0).requests) == 50


def test_a_trace_that_is_too_short_to_summarise_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line."""
    assert summarise_main([str(CASES / "azure_2024.csv")]) == 2
    assert "statistics need" in capsys.readouterr().err
    assert summarise_main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
