"""Faults of a fake driver, by the number of its calls or by the time since it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("code", "hang", "garbage", "frozen", "backwards", "slow", "limit", "lost", "unloaded")


@dataclass(frozen=True)
class Fault:
    """One fault.

    `code`: the call, or the field, fails with `code`. `hang`: the call does not return until
    the fault is over. `garbage`: the answer is `value`. `frozen`: the answer stays what it
    was when the fault began. `backwards`: counters lose `value`. `slow`: the call takes
    `seconds`. `limit`: the enforced limit is `value` milliwatts. `lost`: calls on the GPU fail,
    and its handles stay dead until the driver is opened again. `unloaded`: all calls fail.
    """

    kind: str
    call: str = ""
    """A function, or the name of a field without `NVML_FI_DEV_`; empty: all of them."""
    gpu: int | None = None
    code: str = "UNKNOWN"
    value: float = 0.0
    seconds: float = 0.0
    from_call: int = 0
    until_call: int | None = None
    from_seconds: float = 0.0
    until_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a fault's kind is one of {KINDS}, not {self.kind!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Fault:
        """From JSON values."""
        return cls(**values)

    def active(self, call: int, seconds: float) -> bool:
        """Whether it holds at this call of the driver, at this time."""
        if call < self.from_call or seconds < self.from_seconds:
            return False
        if self.until_call is not None and call >= self.until_call:
            return False
        return self.until_seconds is None or seconds < self.until_seconds

    def hits(self, call: str, gpu: int | None) -> bool:
        """Whether it concerns this call, or this field, on this GPU."""
        return self.call in ("", call) and (self.gpu is None or self.gpu == gpu)
