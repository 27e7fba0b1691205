"""Loads recorded traffic; `shaper/traffic/trace_formats.py` has the formats.

A request without a prompt or without an answer (one that failed, where it was recorded) is
left out and counted in the workload's name.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from shaper.errors import TraceError
from shaper.files.tables import read_header, read_rows
from shaper.files.text import Lines, open_lines
from shaper.traffic.trace_formats import (
    LAYOUTS,
    TAKEN,
    TRACE_FORMATS,
    TraceFormat,
    blocks,
    csv_format,
    csv_parser,
    json_object,
    json_parser,
    tokens_of,
)
from shaper.traffic.workload import TimedRequest, Workload

__all__ = ["TRACE_FORMATS", "TraceFormat", "load_trace"]

MAX_REQUESTS = 1_000_000
WHOLE_REQUESTS = 100_000
"""A file of no more is read whole: a longer run of it goes on with its start, and its mean rate
is that of the whole. Of the public traces of some hours each has fewer."""
# Recorders write a request when it ends: neighbours may change places.
_LATE_REQUESTS = 1000


def load_trace(
    path: Path,
    trace_format: TraceFormat = "auto",
    seed: int = 0,
    *,
    seconds: float | None = None,
    requests: float = 0,
) -> Workload:
    """Read recorded traffic; arrivals start at 0 and ascend.

    Args:
        path: the file.
        trace_format: one of `TRACE_FORMATS`.
        seed: of the text that stands in for the prompts.
        seconds: of it that are needed, from its first request on: a file of more than
            `WHOLE_REQUESTS` is read no further. None: all of it.
        requests: that are needed besides.

    Raises:
        TraceError: the file can't be read, is empty, or has a broken line; the
            message names the file, the line and what is wrong with it.
    """
    enough = max(requests, WHOLE_REQUESTS)
    found: list[TimedRequest] = []
    late: list[TimedRequest] = []
    left_out = 0
    first, cut = float("inf"), False
    with closing(_requests(path, trace_format)) as lines:
        for number, name, request in lines:
            trace_format = name
            if not request.prompt_tokens or not request.output_tokens:
                left_out += 1
                continue
            first = min(first, request.arrival_seconds)
            over = seconds is not None and request.arrival_seconds - first >= seconds
            if over and len(found) >= enough:
                late.append(request)
                cut = len(late) > _LATE_REQUESTS
                if cut:
                    break
            else:
                found.append(request)
            if len(found) > MAX_REQUESTS:
                how = "a --duration" if seconds is None else "a shorter --duration"
                raise TraceError(
                    f"{path}, line {number}: more than {MAX_REQUESTS} requests; give {how}"
                )
    if not cut:
        found += late
    if not found:
        why = f": {left_out} have no prompt or no answer" if left_out else ""
        raise TraceError(f"{path} holds no request{why}")
    found.sort(key=lambda request: request.arrival_seconds)
    shifted = tuple(replace(r, arrival_seconds=r.arrival_seconds - first) for r in found)
    return Workload(_name(path, trace_format, len(found), left_out, cut), shifted, seed)


def _name(path: Path, trace_format: str, count: int, left_out: int, cut: bool) -> str:
    notes = [trace_format]
    if cut:
        notes.append(f"its first {count:,} requests")
    if left_out:
        notes.append(f"{left_out:,} without a prompt or an answer left out")
    return f"{path.name} ({', '.join(notes)})"


def _requests(
    path: Path, trace_format: TraceFormat
) -> Generator[tuple[int, TraceFormat, TimedRequest]]:
    """Line, format and request of each line that is not blank.

    Raises:
        TraceError: see `load_trace`.
    """
    if trace_format == "auto":
        trace_format = _json_format(path)
    with open_lines(path) as lines:
        if trace_format in LAYOUTS:
            parse = json_parser(trace_format)
            rows: Iterator[object] = (line for line in lines if line.strip())
        else:
            header = read_header(lines)
            if header is None:
                raise TraceError(f"{path} holds no request: it is empty")
            if trace_format == "auto":
                trace_format = csv_format(lines, header)
            parse = csv_parser(trace_format, lines, header)
            rows = (cells for cells, _ in read_rows(lines, header))
        for row in rows:
            try:
                request = parse(row)
            except ValueError as error:
                raise lines.error(str(error)) from error
            yield lines.number, trace_format, request


def _json_format(path: Path) -> TraceFormat:
    """Of a file of JSON lines, by the first of them that can only be of one format; `auto`
    where it is none.

    Raises:
        TraceError: no line decides, or one is of neither.
    """
    with open_lines(path) as lines:
        first = True
        for text in lines:
            if not text.strip():
                continue
            if first and text.lstrip().startswith("["):
                raise lines.error(f"a JSON array: `jq -c '.[]'` makes lines of it; {TAKEN}")
            if first and not text.lstrip().startswith("{"):
                return "auto"
            fits = _fitting(lines, text, first)
            if len(fits) == 1:
                return fits[0]
            first = False
    if first:
        raise TraceError(f"{path} holds no request: it is empty")
    raise TraceError(
        f"{path}: nothing in it says whether its times are milliseconds or seconds; give the "
        "format: mooncake (milliseconds) or timed (seconds), as in --format mooncake"
    )


def _fitting(lines: Lines, text: str, first: bool) -> list[TraceFormat]:
    """The formats that a line may be of: by the number of its ids, all that fit it."""
    try:
        record = json_object(text)
        length = tokens_of(record, "input_length")
    except ValueError as error:
        raise lines.error(f"{error}; {TAKEN}" if first else str(error)) from error
    ids = record.get("hash_ids")
    kinds: list[TraceFormat] = ["mooncake", "timed"]
    if not isinstance(ids, list) or not ids:
        return kinds
    found = [kind for kind in kinds if len(ids) == blocks(length, LAYOUTS[kind].block_tokens)]
    if not found:
        needed = [f"{blocks(length, LAYOUTS[k].block_tokens)} in the format {k}" for k in kinds]
        raise lines.error(
            f"{len(ids)} hash_ids for a prompt of {length} tokens, which has {' and '.join(needed)}"
        )
    return found
