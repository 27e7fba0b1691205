"""A limit that nobody would keep stops the start: which engines those are, and what is said."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.config.model import build_config
from shaper.engine import build, shapeable
from shaper.engine.compat import gpus_per_engine, is_diffusion, own_scheduler
from shaper.engine.plugin import use_flag
from shaper.engine.protocols import PassThrough
from shaper.engine.shapeable import (
    check_arguments,
    check_engine,
    engine_obstacle,
    unless_unshaped_ok,
)
from shaper.errors import ConfigError, EngineError, FleetError, GpuUnavailableError
from shaper.ipc.status_block import refusal_path, run_id

LIMITED = build_config({"limits": "500W@1s"})
LAYOUT = {
    **{"pipeline_parallel_size": 1, "tensor_parallel_size": 2, "data_parallel_size": 1},
    **{"distributed_executor_backend": "mp"},
}
MODEL = {"is_moe": False, "runner_type": "generate"}


def engine(
    layout: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **more: Any
) -> Any:
    """As much of vLLM's configuration as is looked at, of a version that has nothing else."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**(LAYOUT | (layout or {}))),
        model_config=SimpleNamespace(**(MODEL | (model or {}))),
        scheduler_config=SimpleNamespace(scheduler_cls="shaper.PowerScheduler"),
        additional_config={},
        **more,
    )


LAYOUTS = [
    ({"pipeline_parallel_size": 2}, ["pipeline parallelism (of 2)", "--tensor-parallel-size"]),
    ({"distributed_executor_backend": "external_launcher"}, ["external launcher", "hang"]),
    ({"prefill_context_parallel_size": 2}, ["prefill context parallelism (of 2)"]),
    ({"decode_context_parallel_size": 4}, ["decode context parallelism (of 4)"]),
    ({"nnodes": 2}, ["2 hosts"]),
    ({"nnodes": 2, "node_rank": 1}, ["2 hosts"]),
    ({"headless": True}, ["--headless"]),
    ({"data_parallel_size": 4, "data_parallel_size_local": 2}, ["4 data-parallel ranks 2 are"]),
    ({"data_parallel_size": 4, "data_parallel_size_local": 0}, ["4 data-parallel ranks 0 are"]),
    ({"data_parallel_size": 2, "data_parallel_backend": "ray"}, ["Ray places"]),
    ({"enable_elastic_ep": True}, ["elastic", "--enable-elastic-ep"]),
]
FINE = [
    {},
    {"data_parallel_size": 4},
    {"data_parallel_size": 4, "data_parallel_size_local": 4, "data_parallel_backend": "mp"},
    {"prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "nnodes": 1},
    {"node_rank": 0, "headless": False, "enable_elastic_ep": False},
    {"distributed_executor_backend": None},
    {"distributed_executor_backend": "ray", "placement_group": None},
    {"data_parallel_backend": "ray"},
]
MODELS = [
    ({"data_parallel_size": 4}, {"is_moe": True}, {}, ["4 data-parallel ranks", "together"]),
    ({}, {"runner_type": "pooling"}, {}, ["pooling"]),
    ({}, {"is_diffusion": True}, {}, ["diffusion"]),
    ({}, {}, {"diffusion_config": object()}, ["diffusion"]),
    ({}, {"multimodal_config": SimpleNamespace(mm_encoder_only=True)}, {}, ["encoder alone"]),
    ({}, {"is_encoder_decoder": True}, {}, ["encoder-decoder"]),
]


@pytest.fixture(autouse=True)
def any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of these models is not asked for."""
    monkeypatch.setattr(shapeable, "engine_coefficients", lambda vllm_config: None)


def refused_line(call: Any) -> str:
    with pytest.raises(EngineError) as found:
        call()
    line = str(found.value)
    assert "\n" not in line
    assert line.startswith("nobody would keep the power limit: ")
    assert line.endswith("or start unshaped with --unshaped-ok")
    return line


@pytest.mark.parametrize(("layout", "says"), LAYOUTS)
def test_a_layout_that_is_not_shaped_stops_the_start(
    layout: dict[str, Any], says: list[str]
) -> None:
    """By the command line already, by vLLM's configuration, and by the engine itself."""
    arguments = argparse.Namespace(**(LAYOUT | layout))
    lines = {
        refused_line(lambda: check_arguments(arguments, LIMITED)),
        refused_line(lambda: check_engine(engine(layout), LIMITED)),
    }
    (line,) = lines
    assert all(word in line for word in says)
    scheduler = SimpleNamespace(vllm_config=engine(layout))
    scheduler.vllm_config.additional_config = {"power_shaper": {"limits": "500W@1s"}}
    assert refused_line(lambda: build.attach(scheduler)) == line


@pytest.mark.parametrize(("layout", "model", "more", "says"), MODELS)
def test_a_model_that_is_not_shaped_stops_the_start(
    layout: dict[str, Any], model: dict[str, Any], more: dict[str, Any], says: list[str]
) -> None:
    """As soon as vLLM knows the model, before it loads it."""
    line = refused_line(lambda: check_engine(engine(layout, model, **more), LIMITED))
    assert all(word in line for word in says)


def test_a_model_whose_work_is_not_known_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it is loaded, and not where nobody asks for a limit."""

    def unknown(vllm_config: Any) -> None:
        raise EngineError("the work of model x can't be computed")

    monkeypatch.setattr(shapeable, "engine_coefficients", unknown)
    with pytest.raises(EngineError, match="model x"):
        check_engine(engine(), LIMITED)
    check_engine(engine(), build_config({}))
    check_engine(engine(), LIMITED.model_copy(update={"unshaped_ok": True}))


@pytest.mark.parametrize("layout", FINE)
def test_what_can_be_shaped_is_not_refused(layout: dict[str, Any]) -> None:
    """Nor what a version does not know yet."""
    check_arguments(argparse.Namespace(**(LAYOUT | layout)), LIMITED)
    assert engine_obstacle(engine(layout), LIMITED) is None
    assert engine_obstacle(engine(layout, {"is_moe": True}), LIMITED) is None or (
        layout.get("data_parallel_size", 1) > 1
    )


@pytest.mark.parametrize(
    ("version", "forced", "refused"),
    [
        ("0.23.0", False, False),
        ("0.33.4", False, False),
        ("0.22.1", False, True),
        ("0.34.0", False, True),
        ("0.1.dev1+gabc", False, True),
        ("0.34.0", True, False),
    ],
)
def test_an_untried_version_stops_the_start_unless_it_is_forced(
    monkeypatch: pytest.MonkeyPatch, version: str, forced: bool, refused: bool
) -> None:
    """It is named with the range and the flag."""
    monkeypatch.setattr(shapeable, "vllm_version", lambda: version)
    config = LIMITED.model_copy(update={"force_version": forced})
    if not refused:
        check_arguments(argparse.Namespace(**LAYOUT), config)
        return
    line = refused_line(lambda: check_arguments(argparse.Namespace(**LAYOUT), config))
    assert all(word in line for word in (version, "0.23 to 0.33", "--force-version"))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"gpu_limits": "500W@1s"}, "the power limit"),
        ({"ramp_watts_per_second": "200W/s"}, "the power limit"),
        ({"schedule": [{"daily": "22:00-06:00", "limits": "500W@1s"}]}, "the power limit"),
        ({"power_group": "rack-1", "group_limits": "4000W@1s"}, "power group rack-1"),
        ({"itl_target_seconds": "50ms"}, "the latency target"),
        ({}, None),
        ({"limits": "500W@1s", "unshaped_ok": True}, None),
    ],
)
def test_only_what_was_asked_for_stops_a_start(settings: dict[str, Any], asked: Any) -> None:
    """And it is named; without any of it, or with `unshaped_ok`, vLLM starts."""
    arguments = argparse.Namespace(**(LAYOUT | {"pipeline_parallel_size": 2}))
    config = build_config(settings)
    if asked is None:
        check_arguments(arguments, config)
        return
    with pytest.raises(EngineError, match=asked):
        check_arguments(arguments, config)


def test_a_vllm_without_our_scheduler_keeps_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings beside a scheduler of somebody else, or of nobody, are refused on every route."""
    monkeypatch.delenv("SHAPER_CONFIG", raising=False)
    plain = {**LAYOUT, "scheduler_cls": None, "additional_config": {}}
    use_flag(argparse.Namespace(**plain))
    given = {"additional_config": {"power_shaper": {"limits": "500W@1s"}}}
    line = refused_line(lambda: use_flag(argparse.Namespace(**(plain | given))))
    assert "--scheduler-cls shaper.PowerScheduler" in line
    other = {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}
    line = refused_line(lambda: use_flag(argparse.Namespace(**(plain | given | other))))
    assert "vllm.v1.core.sched.scheduler.Scheduler" in line
    monkeypatch.setenv("SHAPER_LIMITS", "500W@1s")
    refused_line(lambda: use_flag(argparse.Namespace(**plain)))
    monkeypatch.setenv("SHAPER_UNSHAPED_OK", "true")
    use_flag(argparse.Namespace(**plain))
    monkeypatch.setenv("SHAPER_HOME", "somebody else's variable")
    use_flag(argparse.Namespace(**plain))


def engine_arguments(**changed: Any) -> Any:
    """vLLM's own, of an engine with our scheduler and a limit."""
    from vllm.engine.arg_utils import EngineArgs

    from shaper.emulator.models import model_directory

    return EngineArgs(
        model=str(model_directory("llama-3.1-8b")),
        load_format="dummy",
        distributed_executor_backend="shaper.emulator.executor.EmulatedExecutor",
        scheduler_cls="shaper.PowerScheduler",
        additional_config={"power_shaper": {"limits": "500W@1s"}},
        **changed,
    )


def test_vllms_configuration_is_checked_before_an_engine_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What only the model tells, too: an error to who made it, exit code 2 on a command line."""
    engine_arguments().create_engine_config()
    assert "pooling" in refused_line(engine_arguments(runner="pooling").create_engine_config)
    other = engine_arguments()
    other.scheduler_cls = None
    assert "--scheduler-cls" in refused_line(other.create_engine_config)
    served = engine_arguments(runner="pooling")
    served._shaper_from_command_line = True
    with pytest.raises(SystemExit) as ended:
        served.create_engine_config()
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "pooling" in line
    free = engine_arguments(runner="pooling")
    free.additional_config = {"power_shaper": {}}
    assert free.create_engine_config().model_config.runner_type == "pooling"


class Composed(SimpleNamespace):
    """A scheduler class that is not ours."""


def test_what_is_ours() -> None:
    """Our class by its paths or itself, and what is made of it."""
    import shaper
    from shaper.engine.scheduler import ShapedAsyncScheduler

    subclass = type("Own", (ShapedAsyncScheduler,), {})
    ours = ["shaper.PowerScheduler", "shaper.engine.scheduler.power_scheduler"]
    assert all(map(shapeable.is_ours, [*ours, shaper.PowerScheduler, subclass]))
    others = [None, Composed, "no.such.Scheduler", "vllm.v1.core.sched.scheduler.Scheduler"]
    assert not any(map(shapeable.is_ours, others))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_diffusion_model_keeps_its_own_scheduler(asynchronous: bool) -> None:
    """Ours is built on the class that vLLM would have taken."""
    from shaper.engine.scheduler import Shaped, _shaped

    pytest.importorskip("vllm.v1.core.sched.diffusion_scheduler")
    config = engine({}, {"is_diffusion": True})
    config.scheduler_config.async_scheduling = asynchronous
    assert is_diffusion(config)
    own = own_scheduler(config)
    assert own.__name__ == f"Diffusion{'Async' * asynchronous}Scheduler"
    assert _shaped(own).__mro__[1:3] == (Shaped, own)
    config.model_config.is_diffusion = False
    assert "Diffusion" not in own_scheduler(config).__name__


def test_every_gpu_of_an_engine_is_read() -> None:
    """Ranks of context parallelism have GPUs of their own, in prefill."""
    layout = LAYOUT | {"prefill_context_parallel_size": 4, "pipeline_parallel_size": 3}
    assert gpus_per_engine(SimpleNamespace(**layout)) == 24
    assert gpus_per_engine(SimpleNamespace(**LAYOUT)) == 2


def test_ray_workers_on_other_hosts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once Ray has placed them; all on this host are shaped."""
    placed = {0: "here", 1: "here"}
    util = SimpleNamespace(placement_group_table=lambda group: {"bundles_to_node_id": placed})
    here = SimpleNamespace(get_node_id=lambda: "here")
    ray = SimpleNamespace(util=util, get_runtime_context=lambda: here)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", util)
    layout = {"distributed_executor_backend": "ray", "placement_group": object()}
    assert engine_obstacle(engine(layout), LIMITED) is None
    placed[1] = "there"
    assert "1 other host" in refused_line(lambda: check_engine(engine(layout), LIMITED))


def test_unshaped_ok_passes_what_is_found_out_early() -> None:
    """No GPU, no group; but a wrong setting stops the start all the same."""
    relaxed = LIMITED.model_copy(update={"unshaped_ok": True})
    for error in (GpuUnavailableError("no driver"), FleetError("another group")):
        with pytest.raises(type(error)), unless_unshaped_ok(LIMITED):
            raise error
        with unless_unshaped_ok(relaxed):
            raise error
    with pytest.raises(ConfigError), unless_unshaped_ok(relaxed):
        raise ConfigError("a setting is wrong")


def test_unshaped_ok_starts_whatever_stands_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what is found out last, such as a GPU that can't be read."""

    def start(*args: Any) -> Any:
        raise GpuUnavailableError("no driver")

    monkeypatch.setattr(build, "_start", start)
    monkeypatch.setattr(build, "check_scheduler", lambda scheduler: None)
    vllm_config = engine({"data_parallel_index": 7})
    vllm_config.additional_config = {"power_shaper": {"limits": "500W@1s"}}
    scheduler = SimpleNamespace(vllm_config=vllm_config)
    with pytest.raises(GpuUnavailableError):
        build.attach(scheduler)
    vllm_config.additional_config["power_shaper"]["unshaped_ok"] = True
    shaper = build.attach(scheduler)
    assert isinstance(shaper, PassThrough)
    shaper.close()
    refusal_path(run_id()).unlink()
