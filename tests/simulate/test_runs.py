"""A rack's run: one course for one seed, and for one engine that of an engine alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import PowerLimit
from shaper.emulator.shapes import load_shape
from shaper.errors import ConfigError
from shaper.gpu.profiles import load_profile
from shaper.simulate import runs
from shaper.simulate.arrivals import segments
from shaper.simulate.figures import rack_figures
from shaper.simulate.router import ROUTERS
from shaper.simulate.runs import run_rack
from shaper.simulate.setup import NO_ERRORS, Errors, RackResult, RackSetup
from shaper.simulate.show import rack_dict
from shaper.simulate.simulated_engine import SimulatedEngine, drawn_gpu
from shaper.traffic.synthetic import synthesise
from shaper.traffic.workload import TimedRequest, Workload, prompt_token_ids

SECONDS = 3.0
TRAFFIC = synthesise(30.0, rate_hertz=6.0, seed=3)
ALONE = RackSetup(engines=1, duration_seconds=SECONDS, limits=(PowerLimit(450.0, 0.1),))
GROUP = RackSetup(
    engines=3,
    duration_seconds=SECONDS,
    group_limits=(PowerLimit(1250.0, 0.1),),
    itl_target_seconds=0.1,
    seed=2,
)


def arrays(result: RackResult) -> list[np.ndarray]:
    return [
        each
        for engine in result.engines
        for each in (engine.watts, engine.first_token_seconds, engine.itl_seconds)
    ]


def same(one: RackResult, two: RackResult) -> bool:
    pairs = zip(arrays(one), arrays(two), strict=True)
    return all(a.shape == b.shape and np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.fixture(scope="module")
def group() -> RackResult:
    """Three engines that share a limit."""
    return run_rack(GROUP, TRAFFIC)


def test_the_same_arguments_give_the_same_run(group):
    """To the last bit of every token's time and every millisecond's power."""
    assert same(group, run_rack(GROUP, TRAFFIC))
    assert not same(group, run_rack(replace(GROUP, seed=4), TRAFFIC))


def test_another_process_gives_the_same_run(group):
    """No order of a set or of a hash decides anything."""
    script = (
        "import json, sys\n"
        "from tests.simulate import test_runs as t\n"
        "print(json.dumps(t.digest(t.run_rack(t.GROUP, t.TRAFFIC))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    there = json.loads(done.stdout.splitlines()[-1])
    assert there == digest(group)


def digest(result: RackResult) -> dict[str, Any]:
    """What must not depend on the process."""
    found = rack_dict(result, rack_figures(result))
    return {"group": found["group"], "engines": found["engines"]}


@pytest.mark.parametrize("shaped", [True, False], ids=["shaped", "vllm"])
def test_one_engine_in_a_rack_is_an_engine_alone(shaped):
    """The rack's loop gives it the same tokens at the same times as its own loop does."""
    setup = replace(ALONE, shaped=shaped)
    found = run_rack(setup, TRAFFIC).engines[0]

    from shaper.simulate.engine import new_request

    config = runs._config("h200-sxm", "llama-3.1-8b", 1, 8192, 1024, False)
    alone = SimulatedEngine(setup, 0, config, None)
    for number, arrival in enumerate(segments(TRAFFIC, 1, SECONDS)):
        alone.engine.run_until(arrival.at_seconds)
        tokens = prompt_token_ids(arrival.request, number, 0)
        alone.engine.add(new_request(f"r{number}", tokens, arrival.request.output_tokens, config))
    alone.engine.run_until(SECONDS)
    records = list(alone.engine.requests.values())
    first = [r.token_seconds[0] if r.token_seconds else np.nan for r in records]
    # The engine alone does its last step whole, the rack stops in it.
    done = np.array(first) < SECONDS
    assert done.sum() >= 5
    np.testing.assert_array_equal(np.array(first)[done], found.first_token_seconds[done])
    in_time = [t for r in records for t in r.token_seconds if t < SECONDS]
    assert len(in_time) == found.output_tokens.sum()


def test_no_engine_asks_the_ledger_about_the_past_or_the_future(monkeypatch):
    """All calls to the shared ledger come in the order of the time at which they are made."""
    import shaper.group

    calls: list[tuple[float, int]] = []
    original = shaper.group.memory_groups

    class Watched:
        def __init__(self, handle: Any, index: int) -> None:
            self._handle, self._index = handle, index

        def __getattr__(self, name: str) -> Any:
            return getattr(self._handle, name)

        def _call(self, name: str, now: float, *arguments: Any) -> Any:
            calls.append((now, self._index))
            return getattr(self._handle, name)(*arguments)

        def query(self, start: float, now: float, *rest: Any) -> Any:
            assert start >= now
            return self._call("look", now, start, now, *rest)

        def publish(self, share: Any, now: float) -> None:
            self._call("tell", now, share, now)

        def reserve(self, committed: Any, share: Any, now: float, step: Any) -> bool:
            return bool(self._call("claim", now, committed, share, now, step))

        def commit(self, committed: Any, share: Any, now: float) -> None:
            self._call("enter", now, committed, share, now)

    monkeypatch.setattr(
        shaper.group,
        "memory_groups",
        lambda *a, **k: [Watched(h, i) for i, h in enumerate(original(*a, **k))],
    )
    run_rack(GROUP, TRAFFIC)
    times = [now for now, _ in calls]
    assert {index for _, index in calls} == {0, 1, 2}
    assert times == sorted(times)


def test_a_token_comes_after_its_request_and_its_power_before(group):
    """No request is answered before it came, and tokens of one request go up in time."""
    for engine in group.engines:
        assert np.nanmin(engine.first_token_seconds - engine.arrival_seconds) > 0.0
        assert (engine.itl_seconds >= 0.0).all()
        assert np.nanmax(engine.last_token_seconds) <= SECONDS
        assert len(engine.watts) == round(SECONDS * 1000)
        assert not engine.shaper_errors


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_serves_all_arrivals(router):
    """Each request goes to one engine."""
    result = run_rack(replace(GROUP, router=router, shaped=False, duration_seconds=2.0), TRAFFIC)
    arrived = sum(len(engine.arrival_seconds) for engine in result.engines)
    assert arrived == len(segments(TRAFFIC, 3, 2.0, seed=2))


def test_the_defaults_hide_something_from_the_shaper():
    """Meters, model, steps and host are off by what the seed draws, unless that is left out."""
    blind = run_rack(replace(ALONE, shaped=False), TRAFFIC)
    exact = run_rack(replace(ALONE, shaped=False, errors=NO_ERRORS), TRAFFIC)
    assert exact.engines[0].metered_ratio == 1.0
    assert blind.engines[0].metered_ratio != 1.0
    assert not same(blind, exact)


def test_the_drawn_error_is_shared_by_all_and_own_to_each():
    """The profile is wrong for all engines alike; each one's GPUs differ a little from it."""
    profile = load_profile("h200-sxm")
    shape = load_shape("llama-3.1-8b")
    model = StepModel(profile, WorkCoefficients.from_shape(shape, 1))

    def flop_ratio(errors: Errors, seed: int, index: int) -> float:
        found = drawn_gpu(model, errors, seed, index).profile
        return found.power.joules_per_flop / profile.power.joules_per_flop

    shared, own = Errors(model_ratio=0.05, own_ratio=0.0), Errors(model_ratio=0.0, own_ratio=0.02)
    for seed in range(20):
        assert flop_ratio(shared, seed, 0) == flop_ratio(shared, seed, 1)
        assert flop_ratio(own, seed, 0) != flop_ratio(own, seed, 1)
        assert abs(flop_ratio(shared, seed, 0) - 1.0) <= 0.05
        assert abs(flop_ratio(own, seed, 0) - 1.0) <= 0.02
    assert len({flop_ratio(shared, seed, 0) for seed in range(20)}) == 20


def test_a_slower_clock_and_a_cap_take_watts():
    """The emulated driver holds both, and the peak shows it."""
    setup = replace(ALONE, shaped=False, errors=NO_ERRORS)
    free, slow, capped = (
        rack_figures(run_rack(each, TRAFFIC)).group.mean_watts
        for each in (
            setup,
            replace(setup, gpu_clock_hertz=1.0e9),
            replace(setup, gpu_power_cap_watts=300.0),
        )
    )
    assert slow < 0.9 * free
    assert capped < 0.95 * free


def test_progress_is_told_however_many_requests_come():
    """Twice a second of the run, and it changes nothing."""
    told: list[runs.RackProgress] = []
    result = run_rack(ALONE, TRAFFIC, told.append)
    assert [each.now_seconds for each in told] == [0.5 * k for k in range(1, 7)]
    arrived = [each.arrived_requests for each in told]
    assert arrived == sorted(arrived)
    assert arrived[-1] == len(result.engines[0].arrival_seconds)
    assert same(result, run_rack(ALONE, TRAFFIC))


def test_requests_that_do_not_fit_the_model_are_counted():
    """They are left out, and if none fits the run is refused in one line."""
    short, long = TimedRequest(0.1, 20, 5), TimedRequest(0.2, 200_000, 5)
    result = run_rack(ALONE, Workload("mixed", (short, long)))
    assert result.too_long_requests >= 1
    assert len(result.engines[0].arrival_seconds) >= 1
    with pytest.raises(ConfigError, match="longer than its context"):
        run_rack(ALONE, Workload("long", (long,)))


def test_the_documents_example_runs(capsys):
    """What it prints is a latency and a share of the limit."""
    text = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
    example = text.split("```python")[1].split("```")[0]
    exec(compile(example, "docs/simulate.md", "exec"), {})
    ttft, ratio = map(float, capsys.readouterr().out.split())
    assert 0.0 < ttft < 3.0
    assert 0.2 < ratio < 1.05


def test_under_a_tight_limit_two_engines_do_no_less_than_one_with_half_of_it():
    """Each engine's decodes leave the other one's, and the prompts of both, their part."""
    one = RackSetup(engines=1, duration_seconds=6.0, limits=(PowerLimit(250.0, 0.1),), seed=1)
    two = replace(one, engines=2, limits=(), group_limits=(PowerLimit(500.0, 0.1),))
    alone, group = (
        rack_figures(run_rack(replace(each, errors=NO_ERRORS), TRAFFIC)).group
        for each in (one, two)
    )
    assert group.output_tokens_per_second >= 1.8 * alone.output_tokens_per_second > 0
    assert group.forced_steps == 0
