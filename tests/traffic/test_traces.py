"""The loaders of recorded traffic, and what they say about a broken line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shaper.errors import TraceError
from shaper.traffic.traces import load_trace
from shaper.traffic.workload import prompt_token_ids

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:51.2224670,879,55
"""


def mooncake_line(timestamp: float, tokens: int, ids: list[int], output: int = 5) -> str:
    return json.dumps(
        {
            "timestamp": timestamp,
            "input_length": tokens,
            "output_length": output,
            "hash_ids": ids,
        }
    )


def written(folder: Path, text: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_azure(tmp_path: Path) -> None:
    """Arrivals count from the first request; lengths are the columns'."""
    load = load_trace(written(tmp_path, AZURE))
    assert [r.arrival_seconds for r in load.requests] == pytest.approx(
        [0.0, 4.314579, 64.541877], abs=2e-6
    )
    assert [(r.prompt_tokens, r.output_tokens) for r in load.requests] == [
        (374, 44),
        (396, 109),
        (879, 55),
    ]


def test_mooncake(tmp_path: Path) -> None:
    """Timestamps are milliseconds, an id stands for 512 tokens, order is by time."""
    lines = [mooncake_line(2500, 700, [4, 9]), mooncake_line(500, 512, [4])]
    load = load_trace(written(tmp_path, "\n".join(lines)))
    assert [r.arrival_seconds for r in load.requests] == pytest.approx([0.0, 2.0])
    assert [r.block_ids for r in load.requests] == [(4,), (4, 9)]
    assert load.name.endswith("(mooncake)")


def test_equal_block_ids_are_equal_text(tmp_path: Path) -> None:
    """A shared id gives a shared prefix of 512 tokens; another id other text."""
    lines = [
        mooncake_line(0, 1000, [4, 9]),
        mooncake_line(1, 1024, [4, 8]),
        mooncake_line(2, 900, [4, 9]),
    ]
    load = load_trace(written(tmp_path, "\n".join(lines)))
    first, second, third = (
        prompt_token_ids(request, index, load.seed) for index, request in enumerate(load.requests)
    )
    assert len(first) == 1000
    assert first[:512] == second[:512]
    assert first[512:] != second[512:1000]
    assert first[:900] == third


def test_timed_trace(tmp_path: Path) -> None:
    """vLLM's timed trace has seconds, and 16 tokens an id."""
    lines = [mooncake_line(10.5, 40, [1, 2, 3]), mooncake_line(12.0, 16, [1])]
    load = load_trace(written(tmp_path, "\n".join(lines)))
    assert load.name.endswith("(timed)")
    assert [r.arrival_seconds for r in load.requests] == pytest.approx([0.0, 1.5])
    first, second = (prompt_token_ids(r, i, 0) for i, r in enumerate(load.requests))
    assert first[:16] == second


def test_timed_trace_may_lack_ids(tmp_path: Path) -> None:
    """Without hash ids every prompt is text of its own."""
    line = json.dumps({"timestamp": 0, "input_length": 20, "output_length": 1})
    load = load_trace(written(tmp_path, f"{line}\n{line}"), "timed")
    first, second = (prompt_token_ids(r, i, 0) for i, r in enumerate(load.requests))
    assert len(first) == len(second) == 20
    assert first != second


GOOD = mooncake_line(0, 512, [1])


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (AZURE + "2023-11-16 18:15:46,374\n", 5, "2 columns"),
        (AZURE + "2023-11-16 18:15:46,-3,4\n", 5, "ContextTokens -3"),
        (AZURE + "yesterday,374,44\n", 5, "TIMESTAMP 'yesterday'"),
        ("TIMESTAMP,ContextTokens\n1,2\n", 1, "no column GeneratedTokens"),
        (f"{GOOD}\n\n[1]\n", 3, "not a JSON object"),
        (f"{GOOD}\n{{}}\n", 2, "timestamp None"),
        (f"{GOOD}\n{mooncake_line(float('nan'), 512, [1])}\n", 2, "not finite"),
        (f'{GOOD}\n{{"timestamp": 1, "input_length": 5.5}}\n', 2, "input_length 5.5"),
        (f"{GOOD}\n{mooncake_line(1, 513, [1])}\n", 2, "need 2"),
        (f'{GOOD}\n{mooncake_line(1, 512, [1])[:-3]}"a"]}}\n', 2, "hash_ids"),
        (f"{GOOD}\n{mooncake_line(1, 512, [-1])}\n", 2, "hash_ids"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str | bytes, line: int, what: str) -> None:
    """The message has the file, the line's number and what is wrong."""
    path = written(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    message = str(caught.value)
    assert f"{path}, line {line}: " in message
    assert what in message
    assert "\n" not in message


@pytest.mark.needs_shared
def test_the_published_trace_loads(shared_data: Path) -> None:
    """All of Azure's conversation trace is read: 19,366 requests over 58 minutes."""
    load = load_trace(shared_data / "traces" / "azure2023_llm_conv.csv")
    assert len(load.requests) == 19_366
    assert load.span_seconds == pytest.approx(3501.7, abs=0.1)
