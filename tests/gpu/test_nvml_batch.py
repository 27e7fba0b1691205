"""One call for all fields, what is struck out of it, and where each reading comes from."""

from __future__ import annotations

import pynvml
import pytest

from shaper.errors import GpuError, GpuLostError
from shaper.gpu.capabilities import QUANTITIES, GpuCapabilities, describe_gpus
from shaper.gpu.nvml import NvmlReader, host_gpus
from tests.gpu.clocks import HandClock
from tests.gpu.fake_faults import Fault
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

BATCH = "nvmlDeviceGetFieldValues"


def grace(**values: object) -> FakeGpu:
    """A GPU beside a CPU on one module, metered as a whole only."""
    held: dict[str, object] = {
        "name": "NVIDIA GH200 480GB",
        "instant_milliwatts": None,
        "average_milliwatts": None,
        "module_instant_milliwatts": 800_000,
        "module_average_milliwatts": 790_000,
        "module_limit_milliwatts": 1_000_000,
        "limit_milliwatts": 900_000,
    }
    return FakeGpu("GPU-gh", **(held | values))  # type: ignore[arg-type]


def described(fake: FakeNvml) -> GpuCapabilities:
    (found,) = describe_gpus(NvmlReader([0], HandClock(), fake))
    return found


def test_a_tick_asks_each_gpu_for_its_fields_in_one_call() -> None:
    """The first reads strike out what is not there; then it is one call for each GPU."""
    fake = FakeNvml([FakeGpu("GPU-a", memory_celsius=70, power_cap_nanoseconds=5), FakeGpu("b")])
    reader = NvmlReader([0, 1], HandClock(), fake)
    reader.read()
    fake.calls.clear()
    (first, _) = reader.read()
    assert fake.calls.count(BATCH) == 2
    assert (first.memory_temperature_celsius, first.power_cap_throttle_seconds) == (70.0, 5e-9)
    # What else a tick asks for has no field: the clock and the reasons.
    assert len(fake.calls) == 2 * 3


@pytest.mark.parametrize("code", ["NOT_SUPPORTED", "NOT_FOUND", "NO_PERMISSION"])
@pytest.mark.parametrize("field", ["POWER_INSTANT", "TOTAL_ENERGY_CONSUMPTION", "MEMORY_TEMP"])
def test_a_field_that_is_not_there_costs_only_itself(field: str, code: str) -> None:
    """At the first read already, and in no later batch."""
    gpu = FakeGpu("GPU-a", memory_celsius=70, brake_nanoseconds=1)
    fake = FakeNvml([gpu], faults=[Fault("code", field, code=code)])
    (sample,) = NvmlReader([0], HandClock(), fake).read()
    assert sample.average_watts == 480.0
    assert sample.energy_joules == pytest.approx(1234.567), "by the getter, where not by the field"
    assert (sample.instant_watts is None) == (field == "POWER_INSTANT")
    assert (sample.memory_temperature_celsius is None) == (field == "MEMORY_TEMP")
    assert sample.brake_throttle_seconds == 1e-9


def test_a_driver_that_refuses_the_whole_call_for_one_field_is_asked_one_by_one() -> None:
    """Only what it does not know is left out, and then the batch is one call again."""
    unknown = frozenset({pynvml.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN})
    fake = FakeNvml([FakeGpu("GPU-a", brake_nanoseconds=1)], refuses_batches_with=unknown)
    reader = NvmlReader([0], HandClock(), fake)
    assert reader.read()[0].instant_watts == pytest.approx(512.345)
    fake.calls.clear()
    sample = reader.read()[0]
    assert fake.calls.count(BATCH) == 1
    assert (sample.brake_throttle_seconds, sample.thermal_throttle_seconds) == (1e-9, None)


def test_a_driver_without_fields_is_read_by_getters() -> None:
    """As before drivers knew field values."""
    fake = FakeNvml([FakeGpu("GPU-a")], hidden=frozenset({BATCH}))
    (sample,) = NvmlReader([0], HandClock(), fake).read()
    assert (sample.instant_watts, sample.average_watts) == (None, 470.0)
    assert sample.energy_joules == pytest.approx(1234.567)


def test_a_reading_that_fails_once_is_missing_once() -> None:
    """A time-out is no missing feature: it is asked for again."""
    fake = FakeNvml([FakeGpu("GPU-a")])
    reader = NvmlReader([0], HandClock(), fake)
    reader.read()
    fake.faults = [Fault("code", "POWER_AVERAGE", code="TIMEOUT")]
    assert reader.read()[0].average_watts is None
    fake.faults = [Fault("code", BATCH, code="TIMEOUT")]
    with pytest.raises(GpuError, match="Timeout"):
        reader.read()
    fake.faults = []
    assert reader.read()[0].average_watts == 480.0


def test_a_part_of_the_heat_counter_that_fails_does_not_let_it_fall() -> None:
    """Two counters are one quantity; half of it would look like time that went backwards."""
    gpu = FakeGpu("GPU-a", sw_thermal_nanoseconds=10**9, hw_thermal_nanoseconds=10**9)
    fake = FakeNvml([gpu])
    reader = NvmlReader([0], HandClock(), fake)
    assert reader.read()[0].thermal_throttle_seconds == 2.0
    fake.faults = [Fault("code", "CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN", code="TIMEOUT")]
    assert reader.read()[0].thermal_throttle_seconds is None


def test_where_only_the_module_is_metered_its_power_energy_and_limit_are_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One scope for all three, and it is said."""
    fake = FakeNvml([grace(module_energy_millijoules=5_000)])
    (sample,) = NvmlReader([0], HandClock(), fake).read()
    assert (sample.instant_watts, sample.average_watts) == (800.0, 790.0)
    assert (sample.energy_joules, sample.enforced_limit_watts) == (5.0, 1000.0)
    assert [record.message for record in caplog.records] == [
        "GPU 0 (NVIDIA GH200 480GB): its power is metered with its CPU's, as one module"
    ]
    found = described(fake)
    assert found.power_scope == "module"
    assert found.source("instant_watts").how == "field POWER_INSTANT, module scope"


def test_beside_a_module_a_counter_without_a_scope_is_not_taken_for_the_gpus() -> None:
    """On Grace Hopper it counts the CPU too; the energy is then summed up from power."""
    gpu = grace(instant_milliwatts=500_000, average_milliwatts=490_000)
    found = described(FakeNvml([gpu]))
    assert found.power_scope == "GPU"
    assert found.source("energy_joules").how == "integrated from power"
    gpu.scoped_energy_millijoules = 7_000
    (sample,) = NvmlReader([0], HandClock(), FakeNvml([gpu])).read()
    assert (sample.instant_watts, sample.energy_joules) == (500.0, 7.0)


def test_each_quantity_says_where_it_comes_from_or_why_it_is_missing() -> None:
    """And what the GPU may be limited to."""
    faults = [Fault("code", "nvmlDeviceGetClockInfo", code="NO_PERMISSION")]
    found = described(FakeNvml([FakeGpu("GPU-a", margin_celsius=20)], faults=faults))
    assert tuple(source.quantity for source in found.sources) == QUANTITIES
    assert all(source.how or source.missing for source in found.sources)
    assert found.source("sm_clock_hertz").missing == "no permission"
    assert found.source("memory_temperature_celsius").missing == "not supported"
    limits = (found.min_limit_watts, found.default_limit_watts, found.max_limit_watts)
    assert limits == (200.0, 700.0, 700.0)
    assert (found.driver_version, found.mig) == ("575.57.08", False)
    with pytest.raises(KeyError):
        found.source("horsepower")


def test_the_margin_to_the_slowdown_is_the_drivers_or_the_difference() -> None:
    """Newer GPUs tell the margin, older ones the temperature."""
    newer = NvmlReader([0], HandClock(), FakeNvml([FakeGpu("a", margin_celsius=26)]))
    older = NvmlReader([0], HandClock(), FakeNvml([FakeGpu("a", threshold_celsius=87)]))
    assert [r.gpus[0].slowdown_celsius for r in (newer, older)] == [87.0, 87.0]
    assert [r.read()[0].slowdown_margin_celsius for r in (newer, older)] == [26.0, 26.0]


def test_a_gpu_whose_power_has_gone_for_good_is_lost() -> None:
    """Handles that a driver no longer knows answer so; a new start finds out."""
    fake = FakeNvml([FakeGpu("GPU-a")])
    clock = HandClock()
    reader = NvmlReader([0], clock, fake)
    reader.read()
    fake.faults = [Fault("code", code="INVALID_ARGUMENT")]
    with pytest.raises(GpuLostError, match="no way to read its power"):
        reader.read()
    fake.faults = []
    clock.advance(1.1)
    assert reader.read()[0].instant_watts == pytest.approx(512.345)


def test_all_gpus_of_the_host_are_listed_also_those_in_mig_mode() -> None:
    """What an operator sees before an engine is started."""
    fake = FakeNvml([FakeGpu("a"), FakeGpu("b", mig_mode=1), FakeGpu("c", mig_mode=None)])
    assert [(gpu.uuid, gpu.mig) for gpu in host_gpus(fake)] == [
        ("a", False),
        ("b", True),
        ("c", None),
    ]
    assert fake.open_count == 0


def test_nothing_ever_sets_anything() -> None:
    """Every call of a reader's life is a getter, or opens or closes the driver."""
    fake = FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    reader = NvmlReader([0, 1], HandClock(), fake)
    describe_gpus(reader)
    reader.close()
    names = {name.removeprefix("nvmlDevice").removeprefix("nvmlSystem") for name in fake.calls}
    assert all(name.startswith("Get") for name in names - {"nvmlInit", "nvmlShutdown"})
