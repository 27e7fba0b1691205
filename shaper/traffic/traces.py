"""Loaders of recorded traffic.

- `azure`: CSV with the columns `TIMESTAMP,ContextTokens,GeneratedTokens`
  (Azure/AzurePublicDataset). The text is unknown.
- `mooncake`: a JSON object a line with `timestamp` in milliseconds,
  `input_length`, `output_length` and `hash_ids`, one id per 512 tokens.
- `timed`: the same keys, `timestamp` in seconds and one id per 16 tokens: what
  `vllm bench serve --dataset-name timed_trace` reads with its defaults.

`auto` takes `azure` by the CSV header, and tells the two JSON formats apart by
how many tokens an id stands for.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from shaper.errors import TraceError
from shaper.traffic.workload import TimedRequest, Workload

TraceFormat = Literal["auto", "azure", "mooncake", "timed"]
TRACE_FORMATS: tuple[TraceFormat, ...] = ("auto", "azure", "mooncake", "timed")

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MAX_REQUESTS = 1_000_000
MAX_LINE_BYTES = 4 * 1024 * 1024
# The longest context that any served model takes is 10 million tokens.
MAX_TOKENS = 10_000_000


@dataclass(frozen=True, slots=True)
class _JsonLayout:
    """What the two JSON formats differ in."""

    seconds_per_unit: float
    block_tokens: int


_LAYOUTS = {"mooncake": _JsonLayout(1e-3, 512), "timed": _JsonLayout(1.0, 16)}


def load_trace(path: Path, trace_format: TraceFormat = "auto", seed: int = 0) -> Workload:
    """Read recorded traffic; arrivals start at 0 and ascend.

    Args:
        path: the file.
        trace_format: one of `TRACE_FORMATS`.
        seed: of the text that stands in for the prompts.

    Raises:
        TraceError: the file can't be read, is empty, or has a broken line; the
            message names the file, the line and what is wrong with it.
    """
    lines = _lines(path)
    if trace_format == "auto":
        trace_format = _detect(path)
    parse = _azure(path, lines) if trace_format == "azure" else _parser(trace_format)
    requests: list[TimedRequest] = []
    for number, text in lines:
        try:
            requests.append(parse(text))
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}") from error
        if len(requests) > MAX_REQUESTS:
            raise TraceError(f"{path}, line {number}: more than {MAX_REQUESTS} requests")
    if not requests:
        raise TraceError(f"{path} holds no request")
    requests.sort(key=lambda request: request.arrival_seconds)
    first = requests[0].arrival_seconds
    shifted = tuple(replace(r, arrival_seconds=r.arrival_seconds - first) for r in requests)
    return Workload(f"{path.name} ({trace_format})", shifted, seed)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(raw) == MAX_LINE_BYTES:
                    raise TraceError(f"{path}, line {number}: over {MAX_LINE_BYTES} bytes long")
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise TraceError(
                        f"{path}, line {number}: not UTF-8 text (byte {error.start})"
                    ) from error
                if text.strip():
                    yield number, text
    except OSError as error:
        raise TraceError(f"trace {path} can't be read: {error.strerror}") from error


def _detect(path: Path) -> TraceFormat:
    for number, text in _lines(path):
        if not text.lstrip().startswith("{"):
            return "azure"
        try:
            record = _json_object(text)
            length = _tokens(record, "input_length")
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}") from error
        ids = record.get("hash_ids") or []
        fits = len(ids) == math.ceil(length / _LAYOUTS["mooncake"].block_tokens)
        return "mooncake" if fits else "timed"
    raise TraceError(f"{path} holds no request")


def _azure(path: Path, lines: Iterator[tuple[int, str]]) -> Callable[[str], TimedRequest]:
    number, header = next(lines, (1, ""))
    columns = [cell.strip() for cell in next(csv.reader([header]), [])]
    missing = [column for column in AZURE_COLUMNS if column not in columns]
    if missing:
        raise TraceError(
            f"{path}, line {number}: no column {missing[0]}; "
            f"an Azure trace starts with {','.join(AZURE_COLUMNS)}"
        )
    places = [columns.index(column) for column in AZURE_COLUMNS]

    def parse(text: str) -> TimedRequest:
        cells = next(csv.reader([text]))
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} columns, the header has {len(columns)}")
        stamp, prompt, output = (cells[place].strip() for place in places)
        try:
            # The zone is left out of the arithmetic: only differences matter.
            seconds = (datetime.fromisoformat(stamp) - datetime(1970, 1, 1)).total_seconds()
        except (ValueError, TypeError) as error:
            raise ValueError(f"TIMESTAMP {stamp!r} is no time like 2023-11-16 18:15:46") from error
        return TimedRequest(
            seconds, _count("ContextTokens", prompt), _count("GeneratedTokens", output)
        )

    return parse


def _parser(trace_format: TraceFormat) -> Callable[[str], TimedRequest]:
    layout = _LAYOUTS[trace_format]

    def parse(text: str) -> TimedRequest:
        record = _json_object(text)
        stamp = record.get("timestamp")
        if isinstance(stamp, bool) or not isinstance(stamp, int | float):
            raise ValueError(f"timestamp {stamp!r} is not a number")
        if not math.isfinite(stamp):
            raise ValueError(f"timestamp {stamp!r} is not finite")
        prompt_tokens = _tokens(record, "input_length")
        return TimedRequest(
            stamp * layout.seconds_per_unit,
            prompt_tokens,
            _tokens(record, "output_length"),
            _block_ids(record.get("hash_ids"), prompt_tokens, layout.block_tokens),
            layout.block_tokens,
        )

    return parse


def _json_object(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _tokens(record: dict[str, Any], key: str) -> int:
    if key not in record:
        raise ValueError(f"no key {key!r}")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} {value!r} is not a whole number of tokens")
    return _in_range(key, value)


def _count(key: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise ValueError(f"{key} {text!r} is not a whole number of tokens") from error
    return _in_range(key, value)


def _in_range(key: str, value: int) -> int:
    if not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{key} {value} is not within 1 to {MAX_TOKENS} tokens")
    return value


def _block_ids(value: object, prompt_tokens: int, block_tokens: int) -> tuple[int, ...]:
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or any(
        isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in value
    ):
        raise ValueError("hash_ids is not a list of whole numbers")
    needed = math.ceil(prompt_tokens / block_tokens)
    if len(value) != needed:
        raise ValueError(
            f"{len(value)} hash_ids for a prompt of {prompt_tokens} tokens; "
            f"blocks of {block_tokens} tokens need {needed}"
        )
    return tuple(value)
