"""The figures, on power curves and latencies made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from shaper.core.types import PowerLimit
from shaper.simulate.figures import rack_figures, ttft_seconds
from shaper.simulate.report import rack_page
from shaper.simulate.setup import EngineResult, RackResult, RackSetup
from shaper.simulate.show import limit_text, rack_dict, rack_text

NAN = math.nan


def engine(watts: np.ndarray, metered: float = 1.0, **changes: object) -> EngineResult:
    """An engine with three requests: one finished, one cut off, one not begun."""
    values: dict[str, object] = {
        "arrival_seconds": np.array([0.1, 0.2, 0.9]),
        "prompt_tokens": np.array([100, 200, 300]),
        "output_tokens": np.array([3, 2, 0]),
        "first_token_seconds": np.array([0.2, 0.6, NAN]),
        "last_token_seconds": np.array([0.3, NAN, NAN]),
        "token_seconds": np.array([0.2, 0.25, 0.3, 0.6, 0.9]),
        "steps": 5,
        "kv_mean_ratio": 0.1,
        "kv_peak_ratio": 0.2,
        "preemptions": 1,
        "reasons": (("unconstrained", 4), ("forced_over_budget", 1)),
        "shaper_errors": 0,
    }
    return EngineResult(watts=watts, metered_ratio=metered, **(values | changes))  # type: ignore[arg-type]


def rack(*engines: EngineResult, **changes: object) -> RackResult:
    settings = {
        "engines": len(engines),
        "duration_seconds": 1.0,
        "group_limits": (PowerLimit(700.0, 0.1),),
    }
    return RackResult(RackSetup(**(settings | changes)), "by hand", engines, 0, 0.5)  # type: ignore[arg-type]


def burst(low: float, high: float, begin: int = 400, end: int = 500) -> np.ndarray:
    """A second at `low`, with a stretch of milliseconds at `high`."""
    watts = np.full(1000, low)
    watts[begin:end] = high
    return watts


def test_peaks_of_the_group_are_those_of_the_sum():
    """Two bursts that don't coincide add up to less than their peaks do."""
    result = rack(engine(burst(200.0, 600.0)), engine(burst(200.0, 600.0, 600, 700)))
    figures = rack_figures(result)
    assert figures.group.peak_watts == pytest.approx(800.0)
    assert [each.peak_watts for each in figures.engines] == pytest.approx([600.0, 600.0])
    assert figures.group.mean_watts == pytest.approx(2 * 240.0)
    together = rack_figures(rack(engine(burst(200.0, 600.0)), engine(burst(200.0, 600.0))))
    assert together.group.peak_watts == pytest.approx(1200.0)


def test_windows_over_a_limit_are_counted_each_millisecond():
    """A burst of 100 ms from 400 to 800 W is over 700 W in the windows that hold most of it."""
    outcome = rack_figures(rack(engine(burst(400.0, 800.0)))).group.limits[0]
    # A window with k of its 100 ms in the burst has 400 + 4 k W: over 700 W from k = 76 on.
    over = [400.0 + 4.0 * k - 700.0 for k in [*range(76, 101), *range(76, 100)]]
    assert outcome.true.windows == 901
    assert outcome.true.over_share == pytest.approx(len(over) / 901)
    assert outcome.true.over_watt_seconds == pytest.approx(sum(over) * 0.001)
    assert outcome.true.worst_ratio == pytest.approx(800.0 / 700.0)


def test_metered_watts_are_true_watts_times_each_engines_gain():
    """A meter that shows less hides an excess; the true one stands beside it."""
    result = rack(engine(burst(300.0, 500.0), 0.9), engine(np.full(1000, 250.0), 1.0))
    outcome = rack_figures(result).group.limits[0]
    assert outcome.true.worst_ratio == pytest.approx(750.0 / 700.0)
    assert outcome.metered.worst_ratio == pytest.approx(700.0 / 700.0)
    assert outcome.true.over_share > outcome.metered.over_share


def test_what_still_waits_counts_in_the_time_to_first_token():
    """A queue that never moves can't hide in the tail."""
    one = engine(np.full(1000, 200.0))
    assert ttft_seconds(one, 1.0) == pytest.approx([0.1, 0.4, 0.1])
    stuck = engine(np.full(1000, 200.0), first_token_seconds=np.array([0.2, NAN, NAN]))
    assert ttft_seconds(stuck, 1.0) == pytest.approx([0.1, 0.8, 0.1])


def test_work_and_cost():
    """Tokens over the run's seconds and over its joules; requests by what became of them."""
    found = rack_figures(rack(engine(np.full(1000, 250.0)), engine(np.full(1000, 250.0)))).group
    assert found.output_tokens_per_second == pytest.approx(10.0)
    assert found.prompt_tokens_per_second == pytest.approx(600.0)
    assert found.tokens_per_joule == pytest.approx(10.0 / 500.0)
    assert (found.requests_arrived, found.requests_finished) == (6, 2)
    assert (found.preemptions, found.forced_steps) == (2, 2)
    assert found.e2el_seconds.p50 == pytest.approx(0.2)
    assert found.goodput_requests_per_second == 2.0


def test_gaps_are_between_tokens_of_one_request():
    """From one request's last token to the next one's first is no time between tokens."""
    assert engine(np.full(1000, 200.0)).itl_seconds == pytest.approx([0.05, 0.05, 0.3])
    assert engine(np.full(1000, 200.0)).gaps(0.5) == pytest.approx([0.3])
    assert len(engine(np.full(1000, 200.0), output_tokens=np.array([1, 1, 3])).gaps()) == 2


def test_a_warm_up_is_left_out_but_for_limits_and_peaks():
    """What a start from nothing does to rates and latencies says nothing about the policy."""
    result = rack(engine(burst(200.0, 800.0, 100, 200)), warm_up_seconds=0.15)
    found, whole = rack_figures(result).group, rack_figures(rack(*result.engines)).group
    assert found.peak_watts == whole.peak_watts == pytest.approx(800.0)
    assert found.limits == whole.limits
    assert found.mean_watts == pytest.approx((50 * 800.0 + 800 * 200.0) / 850)
    assert found.output_tokens_per_second == pytest.approx(5 / 0.85)
    assert found.ttft_seconds.max == pytest.approx(0.4)
    assert found.ttft_seconds.p50 == pytest.approx(0.25)
    assert found.requests_finished == whole.requests_finished == 1
    assert found.goodput_requests_per_second == pytest.approx(1 / 0.85)


@pytest.mark.parametrize(("targets", "good"), [((0.1, 0.05), 1.0), ((0.09, 0.05), 0.0),
                                               ((0.1, 0.04), 0.0)])  # fmt: skip
def test_goodput_asks_for_both_targets(targets, good):
    """A request that misses either is not good."""
    ttft, itl = targets
    result = rack(
        engine(np.full(1000, 250.0), first_token_seconds=np.array([0.2 - 1e-9, 0.6, NAN])),
        ttft_target_seconds=ttft,
        itl_target_seconds=itl + 1e-6,
    )
    assert rack_figures(result).group.goodput_requests_per_second == good


def test_the_json_has_its_keys_and_no_nan():
    """Whoever reads it finds every figure, for the group and for each engine."""
    idle = engine(
        np.full(1000, 115.0),
        arrival_seconds=np.empty(0),
        prompt_tokens=np.empty(0, dtype=int),
        output_tokens=np.empty(0, dtype=int),
        first_token_seconds=np.empty(0),
        last_token_seconds=np.empty(0),
        token_seconds=np.empty(0),
    )
    result = rack(engine(burst(200.0, 600.0)), idle, limits=(PowerLimit(500.0, 1.0),))
    text = json.dumps(rack_dict(result, rack_figures(result)), allow_nan=False)
    found = json.loads(text)
    assert len(found["engines"]) == 2
    keys = {
        *("peak_watts_100ms", "p999_watts_100ms", "mean_watts", "ttft_seconds", "itl_seconds"),
        *("over_limit_ratio", "over_limit_watt_seconds", "output_tokens_per_second"),
        *("requests_finished", "goodput_requests_per_second", "tokens_per_joule"),
    }
    for each in (found["group"], *found["engines"]):
        assert keys <= each.keys()
        assert {"p50", "p90", "p99", "max"} <= each["ttft_seconds"].keys()
    assert found["group"]["over_limit_ratio"].keys() == {"700W@100ms"}
    assert found["engines"][0]["over_limit_ratio"].keys() == {"500W@1s"}
    assert found["engines"][1]["ttft_seconds"]["p99"] is None


def test_the_text_names_the_worst_engine_and_what_was_left_out():
    """An operator sees which engine broke its limit, and that requests are missing."""
    result = rack(
        engine(np.full(1000, 300.0)),
        engine(burst(300.0, 600.0)),
        limits=(PowerLimit(500.0, 0.1),),
    )
    lines = rack_text(result, rack_figures(result))
    assert "engine 1 (the worst), 500W@100ms" in lines
    assert "left out" not in lines
    short = RackResult(result.setup, "by hand", result.engines, 3, 0.5)
    assert "3 requests were left out" in rack_text(short, rack_figures(short))


def test_a_window_longer_than_the_run_is_said():
    """There is nothing to judge then."""
    result = rack(engine(np.full(1000, 300.0)), group_limits=(PowerLimit(500.0, 2.0),))
    assert "shorter than the window" in rack_text(result, rack_figures(result))


def test_the_report_holds_everything_itself():
    """One file with its plots, and no ratio of engines that are no two runs of one thing."""
    result = rack(engine(burst(200.0, 600.0)), engine(burst(200.0, 600.0, 600, 700)))
    page = rack_page(result, rack_figures(result))
    assert page.count("shaperPlot('plot") == 3
    assert "700W@100ms" in page
    assert ">ratio<" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


@pytest.mark.parametrize(("limit", "text"), [(PowerLimit(4000.0, 0.1), "4000W@100ms"),
                                             (PowerLimit(560.5, 1.0), "560.5W@1s")])  # fmt: skip
def test_limits_read_as_they_are_written(limit, text):
    """The keys of the JSON are what was given on the command line."""
    assert limit_text(limit) == text
