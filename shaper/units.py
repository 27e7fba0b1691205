"""Quantities as people write them: `50ms`, `560W`, `200W/s`, `1200MHz`."""

from __future__ import annotations

import re
from collections.abc import Mapping

_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z/]*)\s*")
_SECONDS_PER = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_DURATION_SECONDS_PER = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_WATTS_PER = {"mw": 1e-3, "w": 1.0, "kw": 1e3}
_HERTZ_PER = {"hz": 1.0, "mhz": 1e6, "ghz": 1e9}
_WATTS_PER_SECOND_PER = {"w/s": 1.0, "kw/s": 1e3}


def _quantity(text: str, units: Mapping[str, float], example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity; write it like {example}")
    number, unit = float(match[1]), match[2]
    # "MW" would read as milliwatts once lowered, so it is refused.
    factor = None if unit.startswith("MW") else units.get(unit.lower())
    if factor is None:
        known = ", ".join(units)
        what = f"has the unit {unit!r}" if unit else "has no unit"
        raise ValueError(f"{text!r} {what}; use one of {known}, like {example}")
    return number * factor


def parse_seconds(value: object) -> object:
    """Seconds from `"50ms"`, `"1s"` or a number; other types pass through."""
    return _quantity(value, _SECONDS_PER, "50ms") if isinstance(value, str) else value


def parse_watts(value: object) -> object:
    """Watts from `"560W"`, `"4kW"` or a number; other types pass through."""
    return _quantity(value, _WATTS_PER, "560W") if isinstance(value, str) else value


def parse_duration(value: object) -> object:
    """Seconds from `"10min"`, `"2h"` or a number; other types pass through."""
    return _quantity(value, _DURATION_SECONDS_PER, "10min") if isinstance(value, str) else value


def parse_hertz(value: object) -> object:
    """Hertz from `"1200MHz"`, `"1.2GHz"` or a number; other types pass through."""
    return _quantity(value, _HERTZ_PER, "1200MHz") if isinstance(value, str) else value


def parse_watts_per_second(value: object) -> object:
    """Watts per second from `"200W/s"` or a number; `"none"` and other types pass through."""
    if not isinstance(value, str) or value == "none":
        return value
    return _quantity(value, _WATTS_PER_SECOND_PER, "200W/s, or none for no such limit")
