"""An engine that can't be shaped safely is vLLM's alone, and says so."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.cli.serve_flags import new_parser, shaper_config
from shaper.config.model import build_config
from shaper.engine import build, shapeable
from shaper.engine.protocols import PassThrough
from shaper.engine.runtime import LiveShaper
from shaper.ipc.control_file import ControlFile, ControlRecord, Mode
from shaper.ipc.enforcement import enforcement_of
from shaper.ipc.engine_record import read_statuses
from shaper.ipc.status_block import run_id
from tests.controlled import ORIGIN, engine, record, run, watts
from tests.engine.conftest import plain
from tests.engine.harness import GPU, MODEL, random_traffic

__all__ = ["run"]

WHY = "vLLM 0.99.0 is outside"
SETTINGS = {"limits": "420W@100ms", "unshaped_ok": True}


def test_it_is_off_whatever_is_asked(run, caplog):
    """A wish to shape it is refused, in words, and counted; "off" is taken, and a budget where
    the operator has said that nobody need keep it."""
    control, file = engine(run, passes_through=WHY, unshaped_ok=True), ControlFile(run)
    assert control.state.mode == "off"
    wishes: tuple[tuple[int, Mode], ...] = ((1, "on"), (2, "shadow"))
    for sequence, wish in wishes:
        file.write(ControlRecord(run=run, sequence=sequence, mode=wish, origins={"mode": ORIGIN}))
        control.tick(0.02 * sequence)
        assert control.state.mode == "off"
        assert (control.state.refused, control.state.taken_sequence) == (sequence, 0)
    assert WHY in caplog.text
    file.write(record(run, 3))
    assert control.tick(0.1)
    assert (control.state.mode, watts(control)) == ("off", 400.0)
    file.write(ControlRecord(run=run, sequence=4, mode="off", origins={"mode": ORIGIN}))
    control.tick(0.2)
    assert control.state.taken_sequence == 4


def test_a_budget_that_nobody_would_keep_is_refused(run, caplog):
    """Also one that is asked for while it runs."""
    control, file = engine(run, passes_through=WHY), ControlFile(run)
    file.write(record(run, 1))
    control.tick(0.02)
    assert (control.state.refused, control.state.taken_sequence) == (1, 0)
    assert watts(control) == 560.0
    assert WHY in caplog.text


@cache
def config() -> Any:
    from shaper.simulate.engine import engine_config

    return engine_config(MODEL, GPU, additional_config={"power_shaper": SETTINGS})


@pytest.fixture
def served() -> Iterator[Callable[..., tuple[Any, list[Any]]]]:
    """Serves traffic on a scheduler that starts as in a live engine, or on vLLM's own."""
    made = []

    def serve(traffic: Any, attached: bool) -> tuple[Any, list[Any]]:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        from shaper.emulator.kv_cache import true_model
        from shaper.emulator.silicon import EmulatedGpus
        from shaper.engine.scheduler import power_scheduler
        from shaper.gpu.profiles import load_profile
        from shaper.simulate.engine import VirtualEngine, kv_cache, new_request, new_scheduler

        model = true_model(config(), load_profile(GPU))
        outputs: list[Any] = []
        kind = power_scheduler if attached else AsyncScheduler
        scheduler = new_scheduler(config(), kind, kv_cache(config(), model, 2500))
        made.append(scheduler)
        gpus = EmulatedGpus(model.profile, model, start_seconds=0.0)
        virtual = VirtualEngine(
            scheduler, gpus, on_output=lambda output: outputs.append(plain(output))
        )
        for index, (arrival, prompt, tokens) in enumerate(traffic):
            virtual.run_until(arrival)
            virtual.add(new_request(f"r{index}", prompt, tokens, config()))
        while virtual.busy:
            virtual.step()
        return scheduler, outputs

    yield serve
    for scheduler in made:
        scheduler.shutdown()


def test_under_an_untried_version_vllm_schedules_alone(served, monkeypatch, caplog):
    """Under a budget that would bind every output is vLLM's; log, state and metrics say so."""
    monkeypatch.setattr(shapeable, "vllm_version", lambda: "0.99.0")
    traffic = random_traffic(4, count=30)
    with caplog.at_level(logging.WARNING, logger="shaper"):
        scheduler, outputs = served(traffic, True)
    assert isinstance(scheduler.shaper, LiveShaper)
    assert not scheduler.shaper.shaping
    assert "0.99.0" in caplog.text
    assert "0.23 to 0.33" in caplog.text
    (status,) = [each for each in read_statuses(run_id()) if each.info["passes_through"]]
    assert WHY in str(status.info["passes_through"])
    assert enforcement_of(status).unkept == "passes_through"
    assert outputs == served(traffic, False)[1]


def test_forced_it_is_shaped_as_any(served, monkeypatch):
    """`force_version` alone makes the difference."""
    monkeypatch.setattr(shapeable, "vllm_version", lambda: "0.99.0")
    monkeypatch.setenv("SHAPER_FORCE_VERSION", "true")
    scheduler, _ = served([(0.0, [1] * 50, 3)], True)
    assert scheduler.shaper.shaping


def test_a_vllm_that_has_nothing_of_what_we_know_is_served_on(monkeypatch, caplog):
    """Whatever raises while the shaper looks around, with a limit set: vLLM runs, unwatched."""
    monkeypatch.setattr(shapeable, "vllm_version", lambda: "0.99.0")
    bare = SimpleNamespace(additional_config={"power_shaper": SETTINGS})
    found = build.attach(SimpleNamespace(vllm_config=bare))
    assert isinstance(found, PassThrough)
    assert found.schedule(lambda: "vLLM's own") == "vLLM's own"
    assert "0.99.0" in caplog.text
    (status,) = [each for each in read_statuses(run_id()) if each.info["passes_through"]]
    assert enforcement_of(status).unkept == "passes_through"
    found.close()
    assert status.info["engine"] not in {each.info["engine"] for each in read_statuses(run_id())}


def test_the_flag_is_a_setting():
    """And without it none is forced."""

    def flags(*arguments: str) -> argparse.Namespace:
        return new_parser().parse_args(arguments)

    forced = shaper_config(flags("--force-version"))
    assert forced is not None
    assert forced.force_version
    assert not build_config({}).force_version
