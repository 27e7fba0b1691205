"""What the doctor says of GPUs: over a fake driver, in this process and in its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shaper.core.types import ClockEventReasons
from shaper.doctor import gpus
from shaper.doctor.findings import Finding, Status
from shaper.gpu.capabilities import GpuCapabilities, describe_gpus
from shaper.gpu.meter_properties import MeterFacts
from shaper.gpu.nvml import NvmlReader
from tests.doctor.fakes import findings_of, run_doctor
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

HEALTHY: dict[str, Any] = {"reasons": 0, "threshold_celsius": 87, "processes": []}
Script = Callable[..., Path]


def described(**values: Any) -> GpuCapabilities:
    fake = FakeNvml([FakeGpu("GPU-a", **values)])
    (found,) = describe_gpus(NvmlReader([0], library=fake))
    return found


def now(**values: Any) -> Finding:
    fake = FakeNvml([FakeGpu("GPU-a", **values)])
    reader = NvmlReader([0], library=fake)
    return gpus.now(describe_gpus(reader)[0], reader.read()[0])


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(*devices: dict[str, Any], faults: list[dict[str, Any]] | None = None) -> Path:
        listed = [{"uuid": f"GPU-{i}", **HEALTHY, **each} for i, each in enumerate(devices)]
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"gpus": listed, "faults": faults or []}))
        return path

    return write


@pytest.mark.parametrize(
    ("reasons", "word"),
    [
        (ClockEventReasons.SW_POWER_CAP, "power cap"),
        (ClockEventReasons.SW_THERMAL_SLOWDOWN, "heat"),
        (ClockEventReasons.HW_THERMAL_SLOWDOWN, "heat"),
        (ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN, "brake"),
        (ClockEventReasons.HW_SLOWDOWN, "hardware"),
    ],
)
def test_throttling_is_a_warning_in_words(reasons, word):
    """Each reason that costs speed warns, and says what it is."""
    found = now(reasons=int(reasons))
    assert found.status is Status.WARN
    assert word in found.found


def test_every_clock_event_reason_has_a_word():
    """None shows as nothing."""
    assert set(gpus.REASON_WORDS) == set(ClockEventReasons) - {ClockEventReasons.NONE}


def test_an_idle_gpu_is_well():
    """Idle is a clock event reason, and nothing to warn of."""
    assert now(reasons=int(ClockEventReasons.GPU_IDLE)).status is Status.OK


def test_a_gpu_near_its_slowdown_temperature_warns():
    """The margin counts, not the temperature."""
    assert now(reasons=0, celsius=84, threshold_celsius=87).status is Status.WARN
    cool = now(reasons=0, celsius=60, threshold_celsius=87)
    assert cool.status is Status.OK
    assert cool.data["slowdown_margin_celsius"] == 27.0


@pytest.mark.parametrize("watts", [0.0, 0.7, -5.0, 700_000.0, float("nan")])
def test_power_that_an_engine_would_not_believe_fails(watts):
    """Nothing, too little, negative, a thousand times off: the engine takes it for lost."""
    fake = FakeNvml([FakeGpu("GPU-a", **HEALTHY)])
    reader = NvmlReader([0], library=fake)
    (gpu,), (sample,) = describe_gpus(reader), reader.read()
    both = replace(sample, instant_watts=watts, average_watts=watts)
    found = gpus.now(gpu, both)
    assert found.status is Status.FAIL
    assert "lost" in (found.advice or "")
    assert gpus.now(gpu, replace(both, average_watts=400.0)).status is Status.OK
    assert gpus.now(gpu, sample).status is Status.OK


def test_power_that_is_not_believed_after_a_while_fails():
    """A counter that moved and stopped takes the watts with it."""
    gpu, facts = described(), MeterFacts(0)
    assert gpus.meter(gpu, facts, 3.0, counter_moved=False, lost=True).status is Status.FAIL


def test_a_gpu_of_no_watts_fails_the_whole(script):
    """The exit code says so."""
    result = run_doctor(
        "--json",
        "--seconds",
        "0.2",
        gpus=script({"instant_milliwatts": 0, "average_milliwatts": 0}),
    )
    assert findings_of(result)["gpu.now", "GPU 0"]["status"] == "fail"
    assert result.returncode == 1


def test_a_lowered_limit_warns_and_names_the_default():
    """Somebody capped the GPU over the weekend."""
    found = gpus.limits(described(limit_milliwatts=500_000))
    assert found.status is Status.WARN
    assert "500 W" in found.found
    assert "700" in (found.advice or "")
    assert gpus.limits(described()).status is Status.OK
    assert gpus.limits(described(limit_milliwatts=None)).status is Status.WARN


def test_an_unknown_gpu_fails_unless_a_profile_is_named():
    """An engine on it would not start."""
    unknown = described(name="NVIDIA Unheard")
    assert gpus.model(unknown, None).status is Status.FAIL
    assert gpus.model(unknown, "h200-sxm").status is Status.OK
    assert gpus.model(unknown, "h300").status is Status.FAIL


def test_integrated_energy_and_the_scope_of_a_module_warn():
    """What is metered is not what is thought."""
    _, reads = gpus.readings(described(energy_millijoules=None))
    assert reads.status is Status.WARN
    scope, _ = gpus.readings(replace(described(), power_scope="module"))
    assert scope.status is Status.WARN
    scope, _ = gpus.readings(replace(described(), power_scope=""))
    assert scope.status is Status.FAIL
    scope, reads = gpus.readings(described())
    assert (scope.status, reads.status) == (Status.OK, Status.OK)
    assert "POWER_INSTANT" in reads.found


def test_a_counter_that_stands_still_warns_only_after_long_enough():
    """Half a second of it proves nothing."""
    gpu, facts = described(), MeterFacts(0, read_p50_seconds=1e-4, read_p99_seconds=2e-4)
    assert gpus.meter(gpu, facts, 2.0, counter_moved=False).status is Status.WARN
    assert gpus.meter(gpu, facts, 0.5, counter_moved=False).status is Status.OK
    assert gpus.meter(gpu, facts, 2.0, counter_moved=None).status is Status.OK
    slow = replace(facts, read_p50_seconds=0.05)
    assert gpus.meter(gpu, slow, 2.0, counter_moved=True).status is Status.WARN


def test_strangers_and_a_second_engine_on_a_gpu_warn():
    """Shared power can't be attributed; one engine alone is as it should be."""
    gpu = described()
    assert gpus.others(gpu, [], engines=0).status is Status.OK
    assert gpus.others(gpu, [], engines=1).status is Status.OK
    assert gpus.others(gpu, None, engines=0).status is Status.OK
    assert gpus.others(gpu, ["process 7 (python)"], engines=0).status is Status.WARN
    assert gpus.others(gpu, [], engines=2).status is Status.WARN


def test_healthy_gpus_are_all_well(script):
    """Two GPUs, every check of both, and the share of CUDA_VISIBLE_DEVICES."""
    path = script({}, {}, {})
    result = run_doctor(
        *("--json", "--seconds", "1.2"), gpus=path, environ={"CUDA_VISIBLE_DEVICES": "2,0"}
    )
    found = findings_of(result)
    checks = [
        *("gpu.profile", "gpu.scope", "gpu.reads", "gpu.limits", "gpu.now", "gpu.others"),
        *("gpu.meter", "gpu.version"),
    ]
    for gpu in ("GPU 0", "GPU 2"):
        assert {check: found[check, gpu]["status"] for check in checks} == dict.fromkeys(
            checks, "ok"
        )
    assert ("gpu.meter", "GPU 1") not in found
    assert found["gpu.meter", "GPU 0"]["data"]["read_p50_seconds"] > 0
    assert found["host.settings", ""]["status"] == "ok"


def test_a_gpu_in_mig_mode_or_lost_hides_no_other(script):
    """Each is opened by itself."""
    path = script({}, {"mig_mode": 1}, {"lost": True}, {"processes": [2**22 + 1]})
    result = run_doctor("--json", "--seconds", "0.2", gpus=path)
    found = findings_of(result)
    assert result.returncode == 1
    readable = {subject for check, subject in found if check == "gpu.readable"}
    assert readable == {"GPU 1", "GPU 2"}
    assert "MIG" in found["gpu.readable", "GPU 1"]["found"]
    assert found["gpu.now", "GPU 0"]["status"] == "ok"
    assert found["gpu.others", "GPU 3"]["status"] == "warn"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"code": "LIBRARY_NOT_FOUND"}, "--emulate"),
        ({"code": "DRIVER_NOT_LOADED"}, "--emulate"),
        ({"code": "NO_PERMISSION"}, "device files"),
    ],
)
def test_a_driver_that_can_t_be_opened_fails_with_what_to_do(script, fault, words):
    """The other checks go on."""
    path = script({}, faults=[{"kind": "code", "call": "nvmlInit", **fault}])
    result = run_doctor("--json", gpus=path)
    found = findings_of(result)
    assert result.returncode == 1
    assert found["gpu.driver", ""]["status"] == "fail"
    assert words in found["gpu.driver", ""]["advice"]
    assert ("host.shared_memory", "") in found
    assert "Traceback" not in result.stdout + result.stderr


def test_a_driver_call_that_hangs_is_said_after_the_time_given(script):
    """What was found before it stays, and the checks behind it go on."""
    fault = {"kind": "hang", "call": "nvmlDeviceGetFieldValues", "gpu": 1}
    path = script({}, {}, faults=[fault])
    result = run_doctor("--json", "--timeout", "10", "--seconds", "0.2", gpus=path)
    found = findings_of(result)
    assert result.returncode == 1
    assert found["gpu.probe", ""]["data"]["hung"] is True
    assert "GPU 1" in found["gpu.probe", ""]["found"]
    assert found["gpu.now", "GPU 0"]["status"] == "ok"
    assert ("host.user", "") in found


@pytest.mark.parametrize("variable", ["", "-1", "0,0", "MIG-1234", "GPU-nobody", "9"])
def test_a_wrong_cuda_visible_devices_fails_with_what_to_do(script, variable):
    """Each is one line, never a traceback."""
    result = run_doctor(
        *("--json", "--seconds", "0.2"),
        gpus=script({}),
        environ={"CUDA_VISIBLE_DEVICES": variable},
    )
    failed = [f for (check, _), f in findings_of(result).items() if f["status"] == "fail"]
    assert result.returncode == 1
    assert any("CUDA_VISIBLE_DEVICES" in f["advice"] for f in failed)
    assert "Traceback" not in result.stdout + result.stderr
