"""What each of the driver's error codes means here, and what is done about it.

    code ── `ERRORS` ──► one of this project's errors ── `BEHAVIOURS` ──► what happens

At start-up any error is raised. While an engine runs, the class of the error decides: a
reading that is not there for good is struck out and its next way tried (the last way to one
that was there before stays); one that failed this time is missing this time; a GPU or
driver that is gone is opened again, with back-off.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from shaper.errors import (
    GpuError,
    GpuLostError,
    GpuPermissionError,
    GpuUnavailableError,
    GpuUnsupportedError,
)


class Behaviour(enum.Enum):
    """What is done about an error while an engine runs."""

    STRIKE = "that way of reading is struck out, and the next one is tried"
    RETRY = "the reading is missing this time, and asked for again at the next tick"
    RECONNECT = "the driver is let go and opened again, at first after 1 s, later every 30 s"


ERRORS: Mapping[str, type[GpuError]] = {
    "UNINITIALIZED": GpuLostError,
    "INVALID_ARGUMENT": GpuUnsupportedError,
    "NOT_SUPPORTED": GpuUnsupportedError,
    "NO_PERMISSION": GpuPermissionError,
    "ALREADY_INITIALIZED": GpuError,
    "NOT_FOUND": GpuUnsupportedError,
    "INSUFFICIENT_SIZE": GpuError,
    "INSUFFICIENT_POWER": GpuUnavailableError,
    "DRIVER_NOT_LOADED": GpuUnavailableError,
    "TIMEOUT": GpuError,
    "IRQ_ISSUE": GpuLostError,
    "LIBRARY_NOT_FOUND": GpuUnavailableError,
    "FUNCTION_NOT_FOUND": GpuUnsupportedError,
    "CORRUPTED_INFOROM": GpuUnsupportedError,
    "GPU_IS_LOST": GpuLostError,
    "RESET_REQUIRED": GpuLostError,
    "OPERATING_SYSTEM": GpuPermissionError,
    "LIB_RM_VERSION_MISMATCH": GpuUnavailableError,
    "IN_USE": GpuError,
    "MEMORY": GpuError,
    "NO_DATA": GpuError,
    "VGPU_ECC_NOT_SUPPORTED": GpuUnsupportedError,
    "INSUFFICIENT_RESOURCES": GpuError,
    "FREQ_NOT_SUPPORTED": GpuUnsupportedError,
    "ARGUMENT_VERSION_MISMATCH": GpuUnsupportedError,
    "DEPRECATED": GpuUnsupportedError,
    "NOT_READY": GpuError,
    "GPU_NOT_FOUND": GpuUnavailableError,
    "INVALID_STATE": GpuError,
    "RESET_TYPE_NOT_SUPPORTED": GpuUnsupportedError,
    "UNKNOWN": GpuError,
}
"""By the name of the code without `NVML_ERROR_`; one that is not here is a `GpuError`."""

BEHAVIOURS: Mapping[type[GpuError], Behaviour] = {
    GpuUnsupportedError: Behaviour.STRIKE,
    GpuPermissionError: Behaviour.STRIKE,
    GpuUnavailableError: Behaviour.RECONNECT,
    GpuLostError: Behaviour.RECONNECT,
    GpuError: Behaviour.RETRY,
}


def behaviour(error: GpuError) -> Behaviour:
    """What is done about an error while an engine runs."""
    return BEHAVIOURS[type(error)]


def error_table() -> str:
    """Codes, errors and behaviours as a Markdown table, for the documentation."""
    lines = ["| code of NVML | error | while an engine runs |", "|---|---|---|"]
    for kind, done in BEHAVIOURS.items():
        codes = ", ".join(f"`{code}`" for code, error in ERRORS.items() if error is kind)
        more = ", any other" if kind is GpuError else ""
        lines.append(f"| {codes}{more} | `{kind.__name__}` | {done.value} |")
    return "\n".join(lines) + "\n"
