"""The data files of real GPUs, and what is said of a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shaper.errors import ConfigError, UnknownGpuError
from shaper.gpu.profiles import (
    GpuProfile,
    known_profiles,
    load_profile,
    profile_for_device,
    profile_sources,
)


def test_the_five_gpus_are_known() -> None:
    """The GPUs that the project promises are there."""
    assert set(known_profiles()) >= {
        "a100-sxm-80gb",
        "b200-sxm",
        "h100-sxm",
        "h200-sxm",
        "l40s",
    }


@pytest.mark.parametrize("name", known_profiles())
def test_every_number_has_a_source(name: str) -> None:
    """No number of a profile comes from nowhere."""
    profile, sources = load_profile(name), profile_sources(name)
    numbers = {
        f"{group.name}.{field.name}"
        for group in dataclasses.fields(GpuProfile)
        if dataclasses.is_dataclass(getattr(profile, group.name))
        for field in dataclasses.fields(getattr(profile, group.name))
    }
    assert set(sources) == numbers
    assert all(len(source) > 8 for source in sources.values())
    assert profile.name == name


@pytest.mark.parametrize("name", known_profiles())
def test_a_device_name_leads_to_its_profile(name: str) -> None:
    """What the driver calls a GPU finds its profile, whatever the case."""
    for device in load_profile(name).nvml_names:
        found = profile_for_device(device.upper())
        assert found is not None
        assert found.name == name


def test_an_unknown_device_has_none() -> None:
    """A GPU that no file describes is no error."""
    assert profile_for_device("NVIDIA GeForce 256") is None


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    """The message helps to find the right name."""
    with pytest.raises(UnknownGpuError, match=r"did you mean 'h100-sxm'.*l40s"):
        load_profile("h100-sx")


def test_a_user_adds_a_gpu_by_a_file(tmp_path: Path) -> None:
    """A file that names a base gives only what differs."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nbase = "h100-sxm"\nnvml_names = []\n'
        '[power]\nlimit_watts = { value = 500, source = "our rack" }\n'
    )
    mine, base = load_profile(str(path)), load_profile("h100-sxm")
    assert mine.power.limit_watts == 500
    assert mine.memory == base.memory
    assert profile_sources(str(path))["power.limit_watts"] == "our rack"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[power", "not a readable TOML"),
        ('base = "h100-sxm"\n', "name is missing"),
        ('name = "x"\n', r"\[memory\] lacks capacity_bytes"),
        ('name = "x"\nbase = "h100-sxm"\n[pwoer]\n', "did you mean 'power'"),
        ('name = "x"\nbase = "h100-sxm"\n[power]\ngap_wats = 1\n', "did you mean 'gap_watts'"),
        ('name = "x"\nbase = "h100-sxm"\n[power]\ngap_watts = 150\n', "must be { value"),
        (
            'name = "x"\nbase = "h100-sxm"\n[power]\ngap_watts = { value = "a", source = "b" }\n',
            "not a number",
        ),
        (
            'name = "x"\nbase = "h100-sxm"\n[power]\ngap_watts = { value = 150, source = "" }\n',
            "has no source",
        ),
        (
            'name = "x"\nbase = "h100-sxm"\n[power]\n'
            'gap_watts = { value = -1, source = "wrong" }\n',
            "gap_watts is -1",
        ),
        (
            'name = "x"\nbase = "h100-sxm"\n[power]\n'
            'gap_watts = { value = 5000, source = "wrong" }\n',
            "must not fall",
        ),
        (
            'name = "x"\nbase = "h100-sxm"\n[memory]\n'
            'gemm_ratio = { value = 1.5, source = "wrong" }\n',
            "above 1",
        ),
        (
            'name = "x"\nbase = "h100-sxm"\n[memory]\n'
            'gemm_ratio = { value = 0, source = "wrong" }\n',
            "must be above 0",
        ),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    """The message names the file, the key and what is wrong with it."""
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_profile(str(path))
