"""Bindings that are not NVIDIA's own: read where they can be, named where they can't."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest

from shaper.doctor import software
from shaper.errors import GpuUnavailableError
from shaper.gpu import nvml_driver
from shaper.gpu.nvml import NvmlReader, host_gpus
from shaper.gpu.nvml_driver import Driver, binding_file, foreign_binding
from shaper.gpu.profiles import profile_for_device
from tests.gpu.fake_nvml import FakeGpu, FakeNvml


class OldNvml(FakeNvml):
    """As `pynvml` 11 of 2021: text is bytes, fields are numbers, newer names are not there."""

    __file__ = "/env/site-packages/pynvml/__init__.py"
    newer = ("NVML_POWER_SCOPE", "NVML_FI_DEV_POWER", "NVML_FI_DEV_CLOCKS", "NVML_FI_DEV_ENERGY")

    def __getattr__(self, name: str) -> Any:
        if name.startswith(self.newer):
            raise AttributeError(name)
        return super().__getattr__(name)

    def nvmlSystemGetDriverVersion(self) -> Any:  # noqa: N802
        return super().nvmlSystemGetDriverVersion().encode()

    def nvmlDeviceGetUUID(self, handle: Any) -> Any:  # noqa: N802
        return super().nvmlDeviceGetUUID(handle).encode()

    def nvmlDeviceGetName(self, handle: Any) -> Any:  # noqa: N802
        return super().nvmlDeviceGetName(handle).encode()

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: Sequence[Any]) -> Any:  # noqa: N802
        if any(not isinstance(field, int) for field in fields):
            raise TypeError("an integer is required")
        return super().nvmlDeviceGetFieldValues(handle, [(field, 0) for field in fields])


def test_a_binding_that_answers_in_bytes_is_read() -> None:
    """Names, UUIDs and the driver's version are text; GPUs are found by UUID; energy by its
    field without a scope, power by its getter."""
    old = OldNvml([FakeGpu("GPU-aa"), FakeGpu("GPU-bb")])
    reader = NvmlReader(["GPU-b"], library=old)
    (gpu,) = reader.gpus
    assert (gpu.name, gpu.uuid) == ("NVIDIA H200", "GPU-bb")
    profile = profile_for_device(gpu.name)
    assert profile is not None
    assert profile.name == "h200-sxm"
    (capabilities,) = reader.capabilities()
    assert capabilities.driver_version == "575.57.08"
    for _ in range(3):
        (sample,) = reader.read()
    assert (sample.average_watts, sample.energy_joules) == (470.0, 1234.567)
    assert [(gpu.name, gpu.uuid) for gpu in host_gpus(old)] == [
        ("NVIDIA H200", "GPU-aa"),
        ("NVIDIA H200", "GPU-bb"),
    ]


def test_a_module_that_is_no_binding_is_named_with_what_to_install() -> None:
    """A file of the user's own, or a stub."""
    stray = ModuleType("pynvml")
    stray.__file__ = "/home/me/pynvml.py"
    with pytest.raises(GpuUnavailableError, match=r"/home/me/pynvml.py is not NVIDIA's.*NVMLError"):
        Driver(stray)
    with pytest.raises(GpuUnavailableError, match="nvidia-ml-py"):
        NvmlReader([0], library=SimpleNamespace(NVMLError=Exception, nvmlInit=lambda: None))


def test_a_binding_that_can_not_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a dependency, and may still be broken or away."""
    monkeypatch.setattr(nvml_driver, "pynvml", None)
    monkeypatch.setattr(nvml_driver, "_import_error", "ImportError: no module")
    with pytest.raises(GpuUnavailableError, match=r"ImportError.*pip install nvidia-ml-py"):
        NvmlReader([0])
    assert foreign_binding() is None


def test_a_function_that_is_missing_names_the_file() -> None:
    """What can't be asked is struck out, and its reason says who can't."""
    old = OldNvml([FakeGpu("GPU-aa")])
    with pytest.raises(Exception, match=r"site-packages/pynvml/__init__.py has no nvmlDeviceNew"):
        Driver(old).call("nvmlDeviceNew")


def test_the_doctor_names_a_foreign_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `pynvml` shadows the module of NVIDIA's own distribution beside it."""
    assert foreign_binding() is None, binding_file()
    monkeypatch.setattr(nvml_driver, "pynvml", OldNvml([]))
    assert foreign_binding() == OldNvml.__file__
    (found,) = software.binding(foreign_binding())
    assert found.status.value == "warn"
    assert OldNvml.__file__ in found.found
    assert "nvidia-ml-py" in (found.advice or "")
    assert software.binding(None) == []
    assert pynvml is not None


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("NVIDIA H200", "h200-sxm"),
        ("nvidia h200 ", "h200-sxm"),
        ("H200", "h200-sxm"),
        ("NVIDIA H200 141GB HBM3e", "h200-sxm"),
        ("NVIDIA H200 SXM5", "h200-sxm"),
        ("H100-80GB-HBM3", "h100-sxm"),
        ("NVIDIA H100 SXM5 80GB", "h100-sxm"),
        ("A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200 180GB HBM3e", "b200-sxm"),
        # Other boards of the same chip, with other limits, clocks or memory.
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 96GB HBM3", None),
        ("NVIDIA H100", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
        ("", None),
    ],
)
def test_one_board_has_several_names(name: str, profile: str | None) -> None:
    """Maker, socket, kind and size of memory may be there or not; another board is another."""
    found = profile_for_device(name)
    assert (None if found is None else found.name) == profile
