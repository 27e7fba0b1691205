"""The border to NVIDIA's driver: the only module that imports `pynvml`.

Each call is named while it runs, so that one which hangs can be told, and its errors
leave as this project's. Nothing here sets a clock, a limit or a mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

from shaper.errors import GpuError, GpuPermissionError, GpuUnsupportedError
from shaper.gpu.nvml_errors import ERRORS

# Members of the driver's union by its `nvmlValueType_t`.
_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclass(frozen=True, slots=True)
class FieldAnswer:
    """What the driver said of one field; `value` counts only without an error."""

    value: float
    error: GpuError | None = None


class Driver:
    """The driver's calls.

    Args:
        library: the binding or what stands in for it; None: `pynvml`.

    `doing` is the call under way, with its subject; empty between calls. Another thread
    may read it.
    """

    def __init__(self, library: Any = None) -> None:
        self._library: Any = pynvml if library is None else library
        self._codes = {
            code: name
            for name in ERRORS
            if (code := getattr(self._library, f"NVML_ERROR_{name}", None)) is not None
        }
        self.doing = ""

    def number(self, name: str) -> int | None:
        """One of the binding's constants; None where it is too old to have it."""
        value = getattr(self._library, name, None)
        return None if value is None else int(value)

    def call(self, function: str, *arguments: Any, subject: str = "the NVIDIA driver") -> Any:
        """What one of the driver's functions returns.

        Raises:
            GpuError: the class that `ERRORS` gives for the code.
        """
        found = getattr(self._library, function, None)
        if found is None:
            raise GpuUnsupportedError(f"{subject}: this binding has no {function}")
        self.doing = f"{function} on {subject}"
        try:
            return found(*arguments)
        except self._library.NVMLError as error:
            raise self._translated(error, f"{subject}: {error}") from error
        except Exception as error:
            # A binding that can't make sense of an answer is a failed reading, no more.
            raise GpuError(f"{subject}: {function}: {error!r}") from error
        finally:
            self.doing = ""

    def fields(
        self, handle: Any, wanted: Sequence[tuple[int, int]], subject: str
    ) -> list[FieldAnswer]:
        """Several fields of one GPU in one call.

        Args:
            handle: of the GPU.
            wanted: pairs of (field, scope).
            subject: the GPU, for messages.

        Returns:
            One answer for each, in the order of `wanted`, in the driver's units. Where the
            driver refuses the call as a whole, each field is asked for by itself.

        Raises:
            GpuError: the call failed for another reason than a reading that is not there.
        """
        try:
            values = self.call("nvmlDeviceGetFieldValues", handle, list(wanted), subject=subject)
        except (GpuUnsupportedError, GpuPermissionError) as error:
            if len(wanted) == 1:
                return [FieldAnswer(0.0, error)]
            return [self.fields(handle, [pair], subject)[0] for pair in wanted]
        if len(values) != len(wanted):
            raise GpuError(f"{subject}: {len(values)} answers to {len(wanted)} fields")
        return [self._answer(value, subject) for value in values]

    def _answer(self, value: Any, subject: str) -> FieldAnswer:
        if value.nvmlReturn != 0:
            error = self._library.NVMLError(value.nvmlReturn)
            said = f"{subject}: field {value.fieldId}: {error}"
            return FieldAnswer(0.0, self._translated(error, said))
        kind = int(value.valueType)
        if not 0 <= kind < len(_MEMBERS):
            said = f"{subject}: field {value.fieldId} has a value of unknown type {kind}"
            return FieldAnswer(0.0, GpuUnsupportedError(said))
        return FieldAnswer(float(getattr(value.value, _MEMBERS[kind])))

    def _translated(self, error: Any, message: str) -> GpuError:
        name = self._codes.get(getattr(error, "value", None))
        return ERRORS.get(name or "", GpuError)(message)
