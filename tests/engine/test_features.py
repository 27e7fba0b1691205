"""vLLM's features under a budget that binds: all is served, nothing raises, the budget holds."""

from __future__ import annotations

import ast
import random
from functools import cache
from typing import Any

import pytest

from shaper.core.types import PowerLimit, Reason
from shaper.simulate.build import new_engine
from shaper.simulate.engine import engine_config, new_request
from tests.engine.harness import GPU, MODEL, RecordingLog, random_traffic, worst_ratio

BINDING = (PowerLimit(450.0, 0.1),)


@cache
def _config(arguments: str) -> Any:
    return engine_config(MODEL, GPU, **ast.literal_eval(arguments))


def config(arguments: dict[str, Any]) -> Any:
    """Once a process."""
    return _config(repr(arguments))


def served(arguments: dict[str, Any], prepare: Any = None, **settings: Any) -> tuple[Any, Any]:
    """An engine that has served thirty requests, and its log."""
    rng, log = random.Random(5), RecordingLog()
    made = config(arguments)
    engine = new_engine(made, GPU, BINDING, log=log, **settings)
    for index in range(30):
        engine.run_until(0.03 * index)
        prompt = [rng.randrange(256) for _ in range(rng.randint(20, 1500))]
        request = new_request(f"r{index}", prompt, rng.randint(2, 60), made)
        if prepare is not None:
            prepare(index, request)
        engine.add(request)
    engine.run_until(40.0)
    assert not engine.busy
    assert all(r.finished_seconds is not None for r in engine.requests.values())
    assert engine.scheduler.shaper.counters.errors == 0
    assert engine.scheduler.deferral.queue.errors == 0
    return engine, log


def assert_kept(engine: Any, log: Any) -> None:
    """The budget bound, and held."""
    assert sum(decision.limits.binding for decision in log.decisions) > 20
    assert worst_ratio(engine.gpus.take_segments(), BINDING[0]) <= 1.01
    assert not any(decision.reason is Reason.FORCED_OVER_BUDGET for decision in log.decisions)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "prefix-caching": {"enable_prefix_caching": True, "async_scheduling": True},
    "no-prefix-caching": {"enable_prefix_caching": False, "async_scheduling": False},
    "priority": {"scheduling_policy": "priority"},
    "long-prefill-threshold": {"long_prefill_token_threshold": 256},
    # No drafts come, so that each decode takes one token of the four that are planned for it.
    "drafts": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        },
        "async_scheduling": False,
    },
}


@pytest.mark.parametrize("arguments", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_features_of_the_configuration(arguments):
    """Each alone, with one batch in flight or two."""

    def prepare(index: int, request: Any) -> None:
        request.priority = index % 3 - 2  # none is of the class flex

    assert_kept(*served(arguments, prepare))


def test_without_chunked_prefill_prompts_run_whole():
    """They are served, and no step has a part of one; a prompt may then be more than fits a
    window, so that only service is promised."""
    arguments = {"enable_chunked_prefill": False, "max_model_len": 4096}
    chunks: list[int] = []
    engine, _ = served(
        arguments, on_output=lambda output: chunks.extend(
            request.num_computed_tokens for request in output.scheduled_new_reqs
        )
    )  # fmt: skip
    assert len(chunks) == 30
    partial = [r for r in engine.scheduler.requests.values() if r.is_prefill_chunk]
    assert not partial


def test_the_second_model_runner(make_rig):
    """Its branches of the scheduler, under a budget that binds."""
    rig = make_rig(BINDING, v2_runner=True)
    rig.run(random_traffic(8, count=30, rate=20.0))
    assert not rig.engine.busy
    assert rig.shaper.counters.errors == 0
    assert worst_ratio(rig.engine.gpus.take_segments(), BINDING[0]) <= 1.01


def test_lora():
    """More adapters wait than may run at once: vLLM skips those, and all are served."""
    from vllm.lora.request import LoRARequest

    def prepare(index: int, request: Any) -> None:
        if index % 4:
            request.lora_request = LoRARequest(f"a{index % 4}", index % 4, "/nowhere")

    engine, log = served({"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}, prepare)
    assert_kept(engine, log)
