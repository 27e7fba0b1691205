"""The exception tree.

    ShaperError
    ├── ConfigError          a setting is wrong; the message names the key, the value and the fix
    │   ├── MissingPackageError  an optional package is not installed
    │   ├── UnknownGpuError  no profile of that name
    │   └── UnknownModelError  no built-in shape and no config directory of that name
    ├── ControlError         a live change can't be made, or was refused
    ├── EngineError          vLLM is missing, too old, or does not have what the shaper needs
    ├── GpuError             the GPU's driver can't be asked
    │   ├── GpuUnavailableError  no driver, no GPU, or none of the names asked for
    │   ├── GpuPermissionError   the driver refuses this user
    │   ├── GpuUnsupportedError  this GPU or driver does not have the reading
    │   └── GpuLostError         a GPU fell off the bus or was reset
    ├── FleetError           a power group can't be joined, or its shared file is not to be believed
    ├── TraceError           a workload trace or a recording has a broken line
    └── LedgerError          the ledger was asked about a time it no longer holds

A command turns a `ShaperError` into one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys


class ShaperError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ShaperError):
    """A setting is wrong. The message names the key, the value and the fix."""


class MissingPackageError(ConfigError):
    """Something needs an optional package that this Python has not.

    Args:
        what: what needs it, like `--report`.
        package: its name on PyPI.
    """

    def __init__(self, what: str, package: str) -> None:
        super().__init__(
            f"{what} needs {package}, which this Python does not have: "
            f"{sys.executable} -m pip install {package}"
        )


class UnknownGpuError(ConfigError):
    """No GPU profile has that name. The message lists the known ones."""


class UnknownModelError(ConfigError):
    """No built-in shape and no Hugging Face config directory has that name."""


class ControlError(ShaperError):
    """A change of a running server can't be made, or was refused."""


class EngineError(ShaperError):
    """vLLM is missing, or lacks something that the shaper needs."""


class GpuError(ShaperError):
    """The GPU's driver can't be asked."""


class GpuUnavailableError(GpuError):
    """There is no driver or no GPU, or none of the GPUs that were asked for."""


class GpuPermissionError(GpuError):
    """The driver refuses this user the reading."""


class GpuUnsupportedError(GpuError):
    """This GPU or its driver does not have the reading."""


class GpuLostError(GpuError):
    """A GPU fell off the bus, or its driver was unloaded."""


class FleetError(ShaperError):
    """A power group can't be joined, or its shared file is not to be believed."""


class TraceError(ShaperError):
    """A trace or a recording has a broken line. The message says which."""


class LedgerError(ShaperError):
    """The ledger was asked about a time that it no longer holds."""
