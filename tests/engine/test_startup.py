"""Start-up: what stops it, what only warns, and what passes through."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import get_args

import pytest

from shaper.config.model import ShaperConfig, build_config, loose_settings
from shaper.engine import build
from shaper.engine.compat import supported
from shaper.engine.policies import POLICIES
from shaper.engine.protocols import PassThrough
from shaper.engine.readers import EngineGpus
from shaper.errors import ConfigError, GpuUnavailableError
from shaper.gpu.profiles import load_profile
from shaper.recording.format import path_of_rank


def scheduler(settings):
    """As much of vLLM's scheduler as `attach` looks at before it finds the GPUs."""
    config = SimpleNamespace(additional_config={"power_shaper": settings})
    return SimpleNamespace(vllm_config=config)


@pytest.fixture
def no_gpu(monkeypatch):
    """A host without a driver."""

    def start(*args):
        raise GpuUnavailableError("no driver")

    monkeypatch.setattr(build, "engine_obstacle", lambda *args: None)
    monkeypatch.setattr(build, "check_scheduler", lambda scheduler: None)
    monkeypatch.setattr(build, "_start", start)


def test_without_a_limit_an_unreadable_gpu_only_warns(no_gpu, caplog):
    """vLLM serves on, unshaped, and the log says why."""
    with caplog.at_level(logging.WARNING, logger="shaper"):
        shaper = build.attach(scheduler({}))
    assert isinstance(shaper, PassThrough)
    assert shaper.schedule(lambda: "vLLM's own") == "vLLM's own"
    assert "no driver" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"limits": "500W@1s"},
        {"gpu_limits": "500W@1s"},
        {"ramp_watts_per_second": "200W/s"},
        {"schedule": [{"daily": "22:00-06:00", "limits": "500W@1s"}]},
        {"itl_target_seconds": "50ms"},
        {"ttft_target_seconds": "1s"},
    ],
)
def test_with_a_promise_an_unreadable_gpu_stops_the_start(no_gpu, settings):
    """A budget or a target that can't be kept must not look as if it were."""
    with pytest.raises(GpuUnavailableError):
        build.attach(scheduler(settings))


def test_a_wrong_setting_stops_the_start(no_gpu):
    """Also on the native route, where no parser has looked at it before."""
    with pytest.raises(ConfigError, match="limits"):
        build.attach(scheduler({"limts": "500W@1s"}))


def test_each_limit_that_can_never_bind_is_named():
    """Whatever the others are, and wherever it stands; the enforced limit can change, so it is
    no error."""
    config = build_config(
        {
            "limits": ["900W@1s", "950W@10ms"],
            "gpu_limits": ["800W@2s"],
            "schedule": [
                {"daily": "22:00-06:00", "zone": "UTC", "limits": "2kW@1s"},
                {"daily": "08:00-18:00", "zone": "UTC", "limits": "650W@1s"},
            ],
        }
    )
    budget, short, each, night = loose_settings(config, 700.0, 1)
    assert "budget: power limit 900 W over 1 s can never bind" in budget
    assert "is 700 W; " in budget
    assert "950 W over 0.01 s" in short
    assert "945 W in bursts under 0.5 s" in short
    assert "800 W over 2 s" in each
    assert "schedule: daily 22:00-06:00 UTC: power limit 2000 W over 1 s" in night
    # Two GPUs bear the engine's limits, but each its own.
    assert [x.split(" can ")[0] for x in loose_settings(config, 1400.0, 2)] == [
        "budget: power limit 800 W over 2 s",
        "schedule: daily 22:00-06:00 UTC: power limit 2000 W over 1 s",
    ]


@pytest.mark.parametrize("limits", [["690W@1s"], ["600W@1s", "900W@10ms"], []])
def test_limits_that_may_bind_warn_of_nothing(limits):
    """A burst of some milliseconds goes above the enforced limit."""
    assert loose_settings(build_config({"limits": limits}), 700.0, 1) == []


def test_an_engine_starts_with_the_warning(caplog, monkeypatch):
    """Before anything of it is built, by the enforced limits of the GPUs that it found."""

    class StopError(Exception):
        pass

    def stop(*arguments, **named):
        raise StopError

    profile = load_profile("h200-sxm")
    reader = SimpleNamespace(gpus=[SimpleNamespace(enforced_limit_watts=500.0)])
    model = SimpleNamespace(idle_watts=115.0, gpu_count=1)
    monkeypatch.setattr(build, "engine_gpus", lambda *_: EngineGpus(reader, profile))
    monkeypatch.setattr(build, "engine_coefficients", lambda *_: None)
    monkeypatch.setattr(build, "StepModel", lambda *_: model)
    monkeypatch.setattr(build, "join", stop)
    config = build_config({"limits": ["450W@2s", "600W@1s"]})
    with caplog.at_level(logging.WARNING, logger="shaper"), pytest.raises(StopError):
        build._start(SimpleNamespace(vllm_config=SimpleNamespace(), kv_cache_config=None), config)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "600 W over 1 s can never bind: the enforced limit of the GPU is 500 W" in said


def test_the_profile_says_what_a_driver_does_not():
    """A GPU without an enforced limit counts as one of its kind."""
    profile = load_profile("h200-sxm")
    some = [SimpleNamespace(enforced_limit_watts=watts) for watts in (500.0, None)]
    assert EngineGpus(SimpleNamespace(gpus=some), profile).enforced_watts(2) == 1200.0
    assert EngineGpus(SimpleNamespace(gpus=()), profile).enforced_watts(2) == 1400.0


def test_each_rank_has_files_of_its_own():
    """Data-parallel ranks must not write over each other."""
    assert str(path_of_rank("a/run.csv", 0)) == "a/run.csv"
    assert str(path_of_rank("a/run.csv", 2)) == "a/run.rank2.csv"


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [("0.22.9", False), ("0.23.0", True), ("0.33.1rc1", True), ("0.34.0", False), ("dev", False)],
)
def test_supported_versions(version, is_supported):
    """0.23 to 0.33."""
    assert supported(version) is is_supported


@pytest.mark.parametrize("policy", get_args(ShaperConfig.model_fields["policy"].annotation))
def test_every_policy_that_can_be_named_is_there(policy):
    """A new one each time: policies remember."""
    first, second = (POLICIES[policy]() for _ in range(2))
    assert first is not second
    assert callable(first.plan)
