"""Every code of the driver has a place in the one table, and the docs show it."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from shaper import errors
from shaper.errors import GpuError
from shaper.gpu.nvml_driver import Driver
from shaper.gpu.nvml_errors import BEHAVIOURS, ERRORS, behaviour, error_table
from tests.gpu.fake_faults import Fault
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "sensors.md"


def test_the_table_has_each_code_that_the_binding_knows() -> None:
    """A new driver's code is noticed when the binding is updated."""
    prefix = "NVML_ERROR_"
    assert set(ERRORS) == {n.removeprefix(prefix) for n in dir(pynvml) if n.startswith(prefix)}


def test_each_error_has_a_behaviour() -> None:
    """Also one that is added to the tree later."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind for kind in kinds if issubclass(kind, GpuError)} == set(BEHAVIOURS)
    assert {behaviour(kind("x")) for kind in BEHAVIOURS} == set(BEHAVIOURS.values())


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_each_code_leaves_the_driver_as_its_error(code: str) -> None:
    """With the driver's own words, and its error as the cause."""
    driver = Driver(FakeNvml([FakeGpu("a")], faults=[Fault("code", "nvmlInit", code=code)]))
    with pytest.raises(GpuError) as raised:
        driver.call("nvmlInit")
    assert type(raised.value) is ERRORS[code]
    assert isinstance(raised.value.__cause__, pynvml.NVMLError)
    assert driver.doing == ""


def test_a_code_that_nobody_knows_and_a_binding_that_fails_are_gpu_errors() -> None:
    """A driver newer than the table, and an answer that the binding can't decode."""

    class Odd(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:  # noqa: N802
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "odd")

    odd = Odd([], init_error=777)
    for function in ("nvmlInit", "nvmlDeviceGetCount"):
        with pytest.raises(GpuError) as raised:
            Driver(odd).call(function)
        assert type(raised.value) is GpuError


def test_the_documentation_shows_the_table() -> None:
    """`error_table()` is what stands there."""
    assert error_table() in DOCS.read_text()
