"""Start-up: what stops it, what only warns, and what passes through."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import get_args

import pytest

from shaper.config import ShaperConfig, build_config
from shaper.core.budget import resolve
from shaper.engine import startup
from shaper.engine.compat import supported
from shaper.engine.policies import POLICIES
from shaper.engine.protocols import PassThrough
from shaper.errors import ConfigError, GpuUnavailableError
from shaper.recording import path_of_rank


def scheduler(settings):
    """As much of vLLM's scheduler as `attach` looks at before it finds the GPUs."""
    config = SimpleNamespace(additional_config={"power_shaper": settings})
    return SimpleNamespace(vllm_config=config)


@pytest.fixture
def no_gpu(monkeypatch):
    """A host without a driver."""

    def start(*args):
        raise GpuUnavailableError("no driver")

    monkeypatch.setattr(startup, "engine_obstacle", lambda *args: None)
    monkeypatch.setattr(startup, "check_scheduler", lambda scheduler: None)
    monkeypatch.setattr(startup, "_start", start)


def test_without_a_limit_an_unreadable_gpu_only_warns(no_gpu, caplog):
    """vLLM serves on, unshaped, and the log says why."""
    with caplog.at_level(logging.WARNING, logger="shaper"):
        shaper = startup.attach(scheduler({}))
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
        startup.attach(scheduler(settings))


def test_a_wrong_setting_stops_the_start(no_gpu):
    """Also on the native route, where no parser has looked at it before."""
    with pytest.raises(ConfigError, match="limits"):
        startup.attach(scheduler({"limts": "500W@1s"}))


@pytest.mark.parametrize(("limits", "warns"), [("700W@1s", True), ("690W@1s", False)])
def test_limits_above_the_enforced_one_warn(caplog, limits, warns):
    """The enforced limit can change while running, so it is no error."""
    with caplog.at_level(logging.WARNING, logger="shaper"):
        startup._warn_of_loose_limits(resolve(build_config({"limits": limits}).terms, 1), [700.0])
    assert ("the driver acts before" in caplog.text) is warns


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
    caps = {"static_caps": {"prefill_tokens": 512}, "itl_target_seconds": "50ms"}
    config = build_config({"policy": policy, "limits": "500W@1s", **caps})
    first, second = (POLICIES[config.policy](config) for _ in range(2))
    assert first is not second
    assert callable(first.plan)
