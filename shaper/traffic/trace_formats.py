"""The formats of recorded traffic: how a line of each becomes a request.

- `azure`: CSV with the columns `TIMESTAMP,ContextTokens,GeneratedTokens`
  (Azure/AzurePublicDataset), a moment in ISO form, with a time zone or without. The text is
  unknown.
- `burstgpt`: CSV with the columns `Timestamp,Request tokens,Response tokens` (HPMLL/BurstGPT),
  in seconds. The text is unknown.
- `mooncake`: a JSON object a line with `timestamp` in milliseconds,
  `input_length`, `output_length` and `hash_ids`, one id per 512 tokens.
- `timed`: the same keys, `timestamp` in seconds and one id per 16 tokens: what
  `vllm bench serve --dataset-name timed_trace` reads with its defaults.

`auto` takes the CSV formats by their header, and tells the JSON formats apart by how many
tokens an id stands for. Where no line decides that, it refuses to guess: one is a thousand
times the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from shaper.files.tables import Header, float_number, whole_number
from shaper.files.text import Lines, shown
from shaper.traffic.workload import TimedRequest

TraceFormat = Literal["auto", "azure", "burstgpt", "mooncake", "timed"]
TRACE_FORMATS: tuple[TraceFormat, ...] = ("auto", "azure", "burstgpt", "mooncake", "timed")

# The time of arrival, the prompt's tokens and the answer's.
COLUMNS = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
}
TAKEN = (
    f"taken are azure (CSV with {','.join(COLUMNS['azure'])}), "
    f"burstgpt (CSV with {','.join(COLUMNS['burstgpt'])}), "
    "mooncake and timed (a JSON object a line with timestamp, input_length, output_length and "
    "maybe hash_ids; mooncake in milliseconds, timed in seconds)"
)
# The longest context that any served model takes is 10 million tokens.
MAX_TOKENS = 10_000_000
# Seconds since 1970 reach a thousandth of this today: a time of more is in another unit.
_MAX_SECONDS = 1e12
# What a first stamp is that is counted since 1970 and not from the trace's start, by the unit
# that its size speaks for: 2001 to 2128.
_EPOCH = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}
_EPOCH_SECONDS = (1e9, 5e9)

Parse = Callable[[Any], TimedRequest]


@dataclass(frozen=True, slots=True)
class JsonLayout:
    """What the two JSON formats differ in."""

    unit: str
    block_tokens: int


LAYOUTS = {"mooncake": JsonLayout("milliseconds", 512), "timed": JsonLayout("seconds", 16)}


def csv_format(lines: Lines, header: Header) -> TraceFormat:
    """The format that has this header.

    Raises:
        TraceError: none has.
    """
    found = {name: len(header.places(columns)) for name, columns in COLUMNS.items()}
    best = max(found, key=lambda name: found[name])
    missing = [c for c in COLUMNS[best] if not header.places((c,))]
    if not missing:
        return "azure" if best == "azure" else "burstgpt"
    if found[best] < 2:
        raise lines.error(f"not the header of a trace; {TAKEN}")
    raise lines.error(f"no column {missing[0]}; {TAKEN}")


def csv_parser(trace_format: str, lines: Lines, header: Header) -> Parse:
    """What makes a request of a row's cells.

    Raises:
        TraceError: the header lacks a column; or, from the function, ValueError.
    """
    columns = COLUMNS[trace_format]
    places = header.places(columns)
    if len(places) < len(columns):
        missing = next(c for c in columns if not header.places((c,)))
        raise lines.error(
            f"no column {missing}; a trace in the format {trace_format} starts with "
            f"{','.join(columns)}"
        )
    stamp_name, prompt_name, output_name = columns
    moment = Moments(stamp_name) if trace_format == "azure" else Stamps(stamp_name, "seconds")

    def parse(cells: list[str]) -> TimedRequest:
        if len(cells) <= max(places):
            raise ValueError(f"{len(cells)} columns, the header has {len(header.names)}")
        stamp, prompt, output = (cells[place] for place in places)
        return TimedRequest(
            moment.seconds(stamp), _tokens(prompt_name, prompt), _tokens(output_name, output)
        )

    return parse


def json_parser(trace_format: str) -> Parse:
    """What makes a request of a line."""
    layout = LAYOUTS[trace_format]
    stamps = Stamps("timestamp", layout.unit)

    def parse(text: str) -> TimedRequest:
        record = json_object(text)
        stamp = record.get("timestamp")
        if isinstance(stamp, bool) or not isinstance(stamp, int | float):
            raise ValueError(f"timestamp {shown(stamp)} is not a number")
        prompt_tokens = tokens_of(record, "input_length")
        return TimedRequest(
            stamps.seconds(stamp),
            prompt_tokens,
            tokens_of(record, "output_length"),
            _block_ids(record.get("hash_ids"), prompt_tokens, layout.block_tokens),
            layout.block_tokens,
        )

    return parse


class Moments:
    """Reads moments in ISO form. All with a time zone or all without: else it is unknown how
    far apart two of them are. Stateful field: which of the two the first was."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._zoned: bool | None = None

    def seconds(self, text: str) -> float:
        """Seconds since 1970; of a moment without a zone, as if it were in UTC.

        Raises:
            ValueError: it is none.
        """
        try:
            moment = datetime.fromisoformat(text)
        except ValueError as error:
            raise ValueError(
                f"{self._name} {shown(text)} is no time like 2023-11-16 18:15:46"
            ) from error
        zoned = moment.tzinfo is not None
        if self._zoned is None:
            self._zoned = zoned
        if zoned is not self._zoned:
            kinds = ("has a time zone", "have none") if zoned else ("has no time zone", "have one")
            raise ValueError(f"{self._name} {shown(text)} {kinds[0]}, and those before {kinds[1]}")
        start = datetime(1970, 1, 1, tzinfo=UTC if zoned else None)
        return (moment - start).total_seconds()


class Stamps:
    """Reads numbers of one unit. Stateful field: whether the first was seen."""

    def __init__(self, name: str, unit: str) -> None:
        self._name, self._unit = name, unit
        self._seconds_per_unit = _EPOCH[unit]
        self._first = True

    def seconds(self, value: str | int | float) -> float:
        """Seconds from whatever the trace counts from.

        Raises:
            ValueError: it is no time, or the first is plainly in another unit.
        """
        try:
            number = float_number(value)
        except ValueError as error:
            what = "is not finite" if isinstance(value, float | int) else f"is {error}"
            raise ValueError(f"{self._name} {shown(value)} {what}") from error
        seconds = number * self._seconds_per_unit
        if self._first:
            self._check_unit(number)
            self._first = False
        if abs(seconds) >= _MAX_SECONDS:
            raise ValueError(f"{self._name} {shown(value)} is no time in {self._unit}")
        return seconds

    def _check_unit(self, number: float) -> None:
        low, high = _EPOCH_SECONDS
        for unit, seconds_per_unit in _EPOCH.items():
            if low <= number * seconds_per_unit <= high and unit != self._unit:
                raise ValueError(
                    f"{self._name} {number:.0f} looks like {unit} since 1970, and this format "
                    f"has {self._unit}: convert it, or let the times begin at 0"
                )


def json_object(text: str) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ValueError: there is none.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if isinstance(record, list):
        raise ValueError(
            "not a JSON object but an array: write an object a line, as `jq -c '.[]'` does"
        )
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def tokens_of(record: dict[str, Any], name: str) -> int:
    """A number of tokens.

    Raises:
        ValueError: there is none.
    """
    if name not in record:
        raise ValueError(f"no key {name!r}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} {shown(value)} is not a whole number of tokens")
    return _tokens(name, value)


def _tokens(name: str, value: str | int | float) -> int:
    """From 0 on: a request that failed has an answer of none."""
    try:
        tokens = whole_number(value)
    except ValueError as error:
        hint = str(error).partition(": ")[2]
        raise ValueError(
            f"{name} {shown(value)} is not a whole number of tokens{': ' * bool(hint)}{hint}"
        ) from error
    if not 0 <= tokens <= MAX_TOKENS:
        raise ValueError(f"{name} {tokens} is not within 1 to {MAX_TOKENS} tokens")
    return tokens


def blocks(prompt_tokens: int, block_tokens: int) -> int:
    """How many ids a prompt has."""
    return math.ceil(prompt_tokens / block_tokens)


def _block_ids(value: object, prompt_tokens: int, block_tokens: int) -> tuple[int, ...]:
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or any(
        isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in value
    ):
        raise ValueError("hash_ids is not a list of whole numbers")
    needed = blocks(prompt_tokens, block_tokens)
    if len(value) != needed:
        raise ValueError(
            f"{len(value)} hash_ids for a prompt of {prompt_tokens} tokens; "
            f"blocks of {block_tokens} tokens need {needed}"
        )
    return tuple(value)
