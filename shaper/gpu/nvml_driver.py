"""The border to NVIDIA's driver: the only module that imports `pynvml`.

Each call is named while it runs, so that one which hangs can be told, and its errors
leave as this project's. Nothing here sets a clock, a limit or a mode.

NVIDIA's own binding is the distribution `nvidia-ml-py`. Others install a module of the same
name: old ones answer in bytes, know no scopes, and lack functions. What can be read through
them is read; what can't says which file answered, and what to install.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from shaper.errors import (
    GpuError,
    GpuPermissionError,
    GpuUnavailableError,
    GpuUnsupportedError,
)
from shaper.gpu.nvml_errors import ERRORS

try:
    import pynvml
# A binding that is none may raise anything when it is imported.
except Exception as error:
    pynvml = None
    _import_error = f"{type(error).__name__}: {error}"
else:
    _import_error = ""

DISTRIBUTION = "nvidia-ml-py"
INSTALL = (
    "uninstall what brought it (often the distribution 'pynvml'), then "
    f"pip install --force-reinstall {DISTRIBUTION}"
)
"""What to do about a binding that is not NVIDIA's own."""
# Without these nothing can be found or told apart.
_NEEDED = (
    "NVMLError",
    "nvmlInit",
    "nvmlShutdown",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetIndex",
    "nvmlDeviceGetName",
    "nvmlDeviceGetUUID",
)
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

    Raises:
        GpuUnavailableError: there is no binding, or it is none.

    `doing` is the call under way, with its subject; empty between calls. Another thread
    may read it.
    """

    def __init__(self, library: Any = None) -> None:
        self._library: Any = pynvml if library is None else library
        if self._library is None:
            raise GpuUnavailableError(
                f"pynvml can't be imported ({_import_error}): pip install {DISTRIBUTION}"
            )
        lacking = [name for name in _NEEDED if getattr(self._library, name, None) is None]
        if lacking:
            raise GpuUnavailableError(
                f"{binding_file(self._library)} is not NVIDIA's binding: it has no "
                f"{', '.join(lacking)}; {INSTALL}"
            )
        self._knows_scopes = True
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
            where = binding_file(self._library)
            raise GpuUnsupportedError(f"{subject}: the binding {where} has no {function}")
        self.doing = f"{function} on {subject}"
        try:
            answer = found(*arguments)
        except self._library.NVMLError as error:
            raise self._translated(error, f"{subject}: {error}") from error
        except Exception as error:
            # A binding that can't make sense of an answer is a failed reading, no more.
            raise GpuError(f"{subject}: {function}: {error!r}") from error
        finally:
            self.doing = ""
        # Bindings from before 2021 answer in bytes.
        return answer.decode(errors="replace") if isinstance(answer, bytes) else answer

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
            values = self._field_values(handle, wanted, subject)
        except (GpuUnsupportedError, GpuPermissionError) as error:
            if len(wanted) == 1:
                return [FieldAnswer(0.0, error)]
            return [self.fields(handle, [pair], subject)[0] for pair in wanted]
        if len(values) != len(wanted):
            raise GpuError(f"{subject}: {len(values)} answers to {len(wanted)} fields")
        return [self._answer(value, subject) for value in values]

    def _field_values(
        self, handle: Any, wanted: Sequence[tuple[int, int]], subject: str
    ) -> Sequence[Any]:
        name = "nvmlDeviceGetFieldValues"
        if self._knows_scopes:
            try:
                found: Sequence[Any] = self.call(name, handle, list(wanted), subject=subject)
                return found
            except GpuError as error:
                if not isinstance(error.__cause__, TypeError):
                    raise
                # An old binding takes numbers alone.
                self._knows_scopes = False
        if any(scope for _, scope in wanted):
            raise GpuUnsupportedError(f"{subject}: this binding knows no scopes of fields")
        found = self.call(name, handle, [number for number, _ in wanted], subject=subject)
        return found

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


def binding_file(library: Any = None) -> str:
    """The file that answers as `pynvml`."""
    found = pynvml if library is None else library
    return str(getattr(found, "__file__", None) or getattr(found, "__name__", found))


def foreign_binding() -> str | None:
    """The file that answers as `pynvml` where that is not NVIDIA's own; None: it is, or none is."""
    if pynvml is None:
        return None
    file = Path(binding_file())
    try:
        own = metadata.distribution(DISTRIBUTION).files or ()
    except metadata.PackageNotFoundError:
        return str(file)
    known = {Path(str(entry.locate())) for entry in own if entry.name == "pynvml.py"}
    return None if not known or file in known or _same(file, known) else str(file)


def _same(file: Path, known: set[Path]) -> bool:
    try:
        return any(file.samefile(each) for each in known)
    except OSError:
        return False
