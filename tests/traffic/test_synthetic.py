"""Synthetic traffic against its summary, and against the trace behind it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ks_2samp, spearmanr

from bench.studies.summarise import correlation_share, rate_variance, summarise
from shaper.traffic.synthetic import SUMMARY_PATH, load_summary, synthesise
from shaper.traffic.traces import load_trace
from shaper.traffic.workload import TimedRequest, Workload


def columns(load: Workload) -> tuple[NDArray[np.float64], ...]:
    rows = [(r.arrival_seconds, r.prompt_tokens, r.output_tokens) for r in load.requests]
    return tuple(np.array(rows, dtype=np.float64).T)


def test_the_seed_decides() -> None:
    """The same seed gives the same requests, another one others."""
    assert synthesise(30.0, 4.0, seed=3) == synthesise(30.0, 4.0, seed=3)
    assert synthesise(30.0, 4.0, seed=3).requests != synthesise(30.0, 4.0, seed=4).requests


def test_arrivals_ascend_within_the_duration() -> None:
    """No request is before the start, after the end, or out of order."""
    arrivals = columns(synthesise(50.0, 6.0, seed=1))[0]
    assert arrivals[0] >= 0.0
    assert arrivals[-1] < 50.0
    assert (np.diff(arrivals) >= 0.0).all()


@pytest.mark.parametrize("rate", [0.5, 4.5, 40.0])
def test_the_rate_is_the_one_asked_for(rate: float) -> None:
    """Over several seeds the count is that of a Poisson draw around rate times duration."""
    counts = [len(synthesise(200.0, rate, seed).requests) for seed in range(8)]
    expected = 200.0 * rate
    # Five standard deviations of the mean of eight Poisson counts.
    assert abs(np.mean(counts) - expected) < 5.0 * np.sqrt(expected / 8)


def test_lengths_stay_within_those_recorded() -> None:
    """No length is below the least or above the greatest of the summary."""
    summary = load_summary()
    _, prompts, outputs = columns(synthesise(600.0, seed=0))
    assert prompts.min() >= summary.prompt_tokens[0]
    assert prompts.max() <= summary.prompt_tokens[-1]
    assert outputs.min() >= min(row[0] for row in summary.output_tokens)
    assert outputs.max() <= max(row[-1] for row in summary.output_tokens)


@pytest.mark.parametrize(("duration", "rate"), [(0.0, 1.0), (1.0, 0.0), (float("inf"), 1.0)])
def test_nonsense_is_refused(duration: float, rate: float) -> None:
    """A duration or rate that is not above 0 and finite is an error."""
    with pytest.raises(ValueError, match="not above 0"):
        synthesise(duration, rate)


def test_rate_variance_of_regular_arrivals() -> None:
    """Arrivals in step have counts of no variance: (0 - 1) / mean."""
    arrivals = np.arange(0.05, 100.0, 0.1, dtype=np.float64)
    assert rate_variance(arrivals, 1.0) == pytest.approx(-0.1, rel=1e-6)


def test_correlation_share_by_hand() -> None:
    """g(1) = 2 / e; a window much shorter than the correlation time sees all of it."""
    shares = correlation_share(np.array([1.0, 1e-3]), np.array([1.0]))
    assert shares[0, 0] == pytest.approx(2.0 / np.e)
    assert shares[1, 0] == pytest.approx(1.0, abs=1e-3)


def test_summarise_finds_the_structure_of_its_own_traffic() -> None:
    """Traffic drawn from the summary has a summary with the same quantiles."""
    summary, again = load_summary(), summarise(synthesise(7000.0, seed=5))
    middle = slice(3, -4)
    np.testing.assert_allclose(
        again["prompt_tokens"][middle], summary.prompt_tokens[middle], rtol=0.12
    )
    assert again["rate_hertz"] == pytest.approx(summary.rate_hertz, rel=0.03)


def test_summarise_of_constant_lengths() -> None:
    """Requests that are all alike have that one length at every level."""
    requests = tuple(TimedRequest(0.3 * i + 0.001 * (i % 7), 50, 9) for i in range(2000))
    summary = summarise(Workload("alike", requests))
    assert set(summary["prompt_tokens"]) == {50}


@pytest.mark.needs_shared
def test_the_committed_summary_is_that_of_the_trace(shared_data: Path) -> None:
    """`python -m bench.studies.summarise` on the trace gives what is committed."""
    summary = summarise(load_trace(shared_data / "traces" / "azure2023_llm_conv.csv"))
    committed = json.loads(SUMMARY_PATH.read_text())
    assert json.loads(json.dumps(summary)) == {
        key: value for key, value in committed.items() if key != "source"
    }


@pytest.mark.needs_shared
def test_lengths_match_the_trace(shared_data: Path) -> None:
    """Length distributions, their means, and how they depend on each other match."""
    recorded = columns(load_trace(shared_data / "traces" / "azure2023_llm_conv.csv"))
    drawn = columns(synthesise(recorded[0][-1], seed=0))
    for column, kolmogorov_smirnov in ((1, 0.04), (2, 0.025)):
        assert ks_2samp(drawn[column], recorded[column]).statistic < kolmogorov_smirnov
        assert drawn[column].mean() == pytest.approx(recorded[column].mean(), rel=0.03)
        levels = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
        np.testing.assert_allclose(
            np.quantile(drawn[column], levels), np.quantile(recorded[column], levels), rtol=0.08
        )
    ranks = [spearmanr(each[1], each[2]).statistic for each in (drawn, recorded)]
    assert ranks[0] == pytest.approx(ranks[1], abs=0.03)
    # The trace's long outputs belong to prompts of about 1,100 tokens.
    for low, high in ((2, 380), (1021, 1130), (2735, 14_050)):
        medians = [
            np.median(each[2][(each[1] >= low) & (each[1] <= high)]) for each in (drawn, recorded)
        ]
        assert medians[0] == pytest.approx(medians[1], rel=0.1)


@pytest.mark.needs_shared
def test_arrivals_match_the_trace(shared_data: Path) -> None:
    """Rate and burstiness match: the index of dispersion at windows of 0.1 to 20 s."""
    recorded = columns(load_trace(shared_data / "traces" / "azure2023_llm_conv.csv"))[0]
    rate = len(recorded) / recorded[-1]
    drawn = [columns(synthesise(recorded[-1], seed=seed))[0] for seed in range(6)]
    counts = [len(each) for each in drawn]
    assert np.mean(counts) == pytest.approx(len(recorded), rel=0.01)
    for window in (0.1, 0.5, 1.0, 5.0, 20.0):
        mean = rate * window
        wanted = 1.0 + rate_variance(recorded, window) * mean
        found = np.mean([1.0 + rate_variance(each, window) * mean for each in drawn])
        # An hour holds few of the slow fluctuations: long windows scatter by seed.
        assert found == pytest.approx(wanted, rel=0.05 if window < 1.0 else 0.3)
