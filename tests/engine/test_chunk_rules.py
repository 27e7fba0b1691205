"""What vLLM makes of a chunk: bounds of its own, blocks of a hybrid model, drafts of a decode."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from shaper.core.types import PowerLimit, Reason
from shaper.engine.compat import has
from shaper.simulate.build import new_engine
from shaper.simulate.engine import engine_config, new_request
from tests.engine.harness import GPU, MODEL, RecordingLog, worst_ratio
from tests.engine.test_counted import Compared, text

LIMIT = PowerLimit(450.0, 0.1)
THRESHOLDS: dict[str, dict[str, Any]] = {
    "fixed": {"long_prefill_token_threshold": 512},
    "adaptive": {
        "long_prefill_token_threshold": 512,
        "long_prefill_token_threshold_adaptive": True,
    },
}


def engine(limit: PowerLimit, **arguments: Any) -> tuple[Any, Any, RecordingLog]:
    config, log = engine_config(MODEL, GPU, **arguments), RecordingLog()
    return new_engine(config, GPU, (limit,), log=log), config, log


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_the_bound_on_long_prompts_is_the_one_that_holds(kind, monkeypatch):
    """Alone in the engine a prompt has none since 0.31; each step is the one that was planned."""
    if kind == "adaptive" and not has("lone_prompt_unbounded"):
        pytest.skip("this vLLM has no adaptive bound")
    compared = Compared(monkeypatch)
    made, config, log = engine(LIMIT, **THRESHOLDS[kind])
    for index, arrival in enumerate((0.0, 2.0, 2.0, 2.0)):
        made.run_until(arrival)
        made.add(new_request(f"r{index}", text(index, 9000), 20, config))
    made.run_until(10.0)
    assert all(each.finished_seconds is not None for each in made.requests.values())
    assert worst_ratio(made.gpus.take_segments(), LIMIT) <= 1.005
    assert not compared.other
    assert not any(decision.reason is Reason.FORCED_OVER_BUDGET for decision in log.decisions)


@pytest.mark.parametrize("block", [528, 1072])
def test_a_hybrid_model_gets_chunks_that_it_can_take(block, monkeypatch):
    """Beside many decodes a chunk below its block would be nothing at all."""
    compared = Compared(monkeypatch)
    made, config, log = engine(LIMIT, async_scheduling=True)
    scheduler = made.scheduler
    for index in range(200):
        made.add(new_request(f"d{index}", text(index, 100), 900, config))
    made.run_until(1.0)
    scheduler.cache_config = copy.copy(scheduler.cache_config)
    scheduler.cache_config.block_size = block
    scheduler.need_mamba_block_aligned_split = True
    start = made.now_seconds
    for index in range(4):
        # None begins as a decode does: a hybrid model caches whole blocks.
        made.add(new_request(f"p{index}", text(1000 + index, 3000), 5, config))
    made.run_until(start + 4.0)
    assert scheduler.shaper.counters.errors == 0
    firsts = [made.requests[f"p{index}"].token_seconds for index in range(4)]
    assert all(firsts)
    assert max(tokens[0] for tokens in firsts) - start <= 3.0
    assert worst_ratio(made.gpus.take_segments(), LIMIT) <= 1.005
    assert not any(decision.reason is Reason.FORCED_OVER_BUDGET for decision in log.decisions)
    assert compared.same > 20 * len(compared.other)


def speculating(drafts: int, coming: int = 0) -> tuple[float, float, RecordingLog]:
    """Seconds in which 100 requests are served, and how far power went."""
    limit = PowerLimit(560.0, 0.1)
    arguments: dict[str, Any] = {"async_scheduling": False}
    if drafts:
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": drafts,
            "prompt_lookup_max": 3,
        }
    made, config, log = engine(limit, **arguments)
    scheduler = made.scheduler
    if coming:
        inner = scheduler.update_from_output

        def update(output: Any, answer: Any) -> Any:
            found = inner(output, answer)
            for index, request in enumerate(scheduler.running):
                # Now all of them, now some, now none.
                if not request.is_prefill_chunk and (scheduler.current_step // 20 + index) % 3:
                    request.spec_token_ids = [1] * coming
            return found

        scheduler.update_from_output = update
    for index in range(100):
        made.run_until(0.01 * index)
        made.add(new_request(f"r{index}", text(index, 300), 150, config))
    while made.busy and made.now_seconds < 120.0:
        made.step()
    assert not made.busy
    assert scheduler.shaper.counters.errors == 0
    return made.now_seconds, worst_ratio(made.gpus.take_segments(), limit), log


def test_drafts_that_do_not_come_cost_nothing():
    """Seven are configured, and none is found: as quick as without speculation."""
    without, _, _ = speculating(0)
    seconds, ratio, log = speculating(7)
    assert seconds <= 1.2 * without
    assert ratio <= 1.005
    assert not any(decision.reason is Reason.FORCED_OVER_BUDGET for decision in log.decisions)


def test_drafts_that_come_are_planned():
    """They come in waves, and are all refused: power holds all the same."""
    _, ratio, log = speculating(7, coming=7)
    assert ratio <= 1.005
    assert not any(decision.reason is Reason.FORCED_OVER_BUDGET for decision in log.decisions)
