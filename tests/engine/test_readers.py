"""Which GPUs an engine reads, and which profile describes them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.cli.record import _meta, _real
from shaper.config.model import ShaperConfig, build_config
from shaper.doctor import gpu_probe, gpus
from shaper.doctor.findings import Checks
from shaper.engine.readers import check_gpus, engine_gpus
from shaper.errors import ConfigError, GpuUnavailableError
from shaper.gpu import nvml_driver
from shaper.gpu.nvml import NvmlReader
from tests.gpu.fake_nvml import FakeGpu, FakeNvml

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"


def config(**settings: Any) -> ShaperConfig:
    return build_config({"limits": "1000W@1s", **settings})


def vllm(world: int, rank: int = 0, assigned: tuple[Any, ...] = ()) -> Any:
    parallel = SimpleNamespace(
        tensor_parallel_size=world,
        pipeline_parallel_size=1,
        data_parallel_rank_local=rank,
        assigned_physical_gpu_ids=assigned,
    )
    return SimpleNamespace(parallel_config=parallel)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Two H200 and an H100."""
    for name in ("SHAPER_EMULATE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    names = (H200, H200, H100)
    fake = FakeNvml(
        [FakeGpu(f"GPU-{letter}", name=n) for letter, n in zip("abc", names, strict=True)]
    )
    monkeypatch.setattr(nvml_driver, "pynvml", fake)
    return fake


def test_gpus_of_one_kind_have_its_profile(host: FakeNvml) -> None:
    """However one of them is spelled."""
    host.devices[1].name = "H200 141GB HBM3e"
    found = engine_gpus(vllm(2), config())
    assert (len(found.reader.gpus), found.profile.name) == (2, "h200-sxm")


@pytest.mark.parametrize("names", [(H100, H200), (H200, H100), (H200, "NVIDIA H200 NVL")])
def test_an_engine_on_two_kinds_of_gpu_is_refused(host: FakeNvml, names: tuple[str, str]) -> None:
    """Not the first one's profile in silence; both are named, and what to do."""
    for device, name in zip(host.devices, names, strict=False):
        device.name = name
    with pytest.raises(ConfigError, match="gpu_profile") as caught:
        engine_gpus(vllm(2), config())
    assert "NVL" in names[1] or all(name in str(caught.value) for name in names)
    with pytest.raises(ConfigError, match="gpu_profile"):
        check_gpus(config(), 2)


def test_a_profile_that_is_named_for_two_kinds_is_warned_of(
    host: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator decides, and is told what it means."""
    host.devices[1].name = H100
    with caplog.at_level(logging.WARNING):
        found = engine_gpus(vllm(2), config(gpu_profile="h200-sxm"))
    assert found.profile.name == "h200-sxm"
    assert "not alike" in caplog.text
    assert H100 in caplog.text


@pytest.mark.parametrize("visible", ["0,GPU-a", "GPU-a,0", "GPU-b,1", "gpu-A,GPU-a"])
def test_one_gpu_by_index_and_by_uuid_is_refused(
    host: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    """Within one engine, and between two engines of one server: its power would count twice."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for world, rank in ((2, 0), (1, 0), (1, 1)):
        with pytest.raises(GpuUnavailableError, match=r"same GPU|twice"):
            engine_gpus(vllm(world, rank), config())
    with pytest.raises(GpuUnavailableError, match=r"same GPU|twice"):
        check_gpus(config(), 1, 2)
    with pytest.raises(GpuUnavailableError, match=r"same GPU|twice"):
        _real()
    with pytest.raises(GpuUnavailableError, match=r"same GPU|twice"):
        list(gpu_probe._visible(Checks(gpus.SECTION)))


@pytest.mark.parametrize("assigned", [(0, "GPU-a"), ("GPU-a", "GPU-a"), (1, 1)])
def test_device_ids_that_name_a_gpu_twice_are_refused(
    host: FakeNvml, assigned: tuple[Any, ...]
) -> None:
    """What vLLM deals out is not believed blindly, whether one engine has both or two share."""
    for world, rank in ((2, 0), (1, 1)):
        with pytest.raises(GpuUnavailableError, match="same GPU"):
            engine_gpus(vllm(world, rank, assigned), config())
    with pytest.raises(GpuUnavailableError, match="same GPU"):
        check_gpus(config(), 2, 1, assigned)


@pytest.mark.parametrize("name", ["MIG-1234", "MIG-GPU-a/1/0", "mig-1234"])
def test_a_slice_is_refused_wherever_it_is_named(
    host: FakeNvml, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By the reason that counts, once or twice, in the environment or among device ids."""
    with pytest.raises(GpuUnavailableError, match="whole GPUs only"):
        engine_gpus(vllm(2, 0, (name, name)), config())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{name},{name}")
    with pytest.raises(GpuUnavailableError, match="whole GPUs only"):
        engine_gpus(vllm(2), config())


def test_the_doctor_warns_of_gpus_that_are_not_alike(host: FakeNvml) -> None:
    """Engines of one GPU each are well with them, so it is no failure."""
    alike, unlike = NvmlReader([0, 1]).gpus, NvmlReader([0, 1, 2]).gpus
    assert gpus.kinds(alike, None) == []
    (found,) = gpus.kinds(unlike, None)
    assert found.status.value == "warn"
    assert H100 in found.found


def test_a_recording_of_two_kinds_names_no_profile(host: FakeNvml) -> None:
    """Fitting it must ask which; one kind is named as before."""
    options: Any = SimpleNamespace(emulate=None)
    assert _meta(NvmlReader([0, 1]), 0.02, options)["gpu"] == "h200-sxm"
    assert "gpu" not in _meta(NvmlReader([0, 2]), 0.02, options)
