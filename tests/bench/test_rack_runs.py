"""Which racks a comparison runs: its searches, its memory, and its plan."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness import runner as pool
from bench.harness.runner import Run, Told
from bench.racks import plan, policies, searches, variants
from bench.racks.outcome import Outcome, ledger_time
from bench.racks.rows import table
from bench.racks.searches import Knobs
from bench.racks.store import Store, plant_text, rack_runner, run_name
from shaper.errors import ConfigError
from shaper.simulate.checks import check_setup
from shaper.simulate.setup import RackSetup
from shaper.traffic.workload import TimedRequest, Workload
from tests.bench.rack_fakes import RACK, WORKLOAD, Inline, fake_pool, fake_rack, outcome


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RackSetup]:
    """The racks that were run, in order; `fake_rack` answers."""
    return fake_pool(monkeypatch)


# --- searches


def knobs(tokens: int, peak_watts: float, ttft_seconds: float) -> Knobs:
    return Knobs(tokens, 8, outcome([peak_watts], ttft_p99_seconds=ttft_seconds))


def test_the_best_knobs_keep_the_limit_at_the_lowest_ttft() -> None:
    """Neither the lowest peak nor the lowest TTFT of all."""
    grid = [knobs(256, 3000.0, 9.0), knobs(512, 3510.0, 2.0), knobs(1024, 3600.0, 1.0)]
    assert searches.best_knobs(grid, 3500.0).batched_tokens == 512


def test_where_no_knobs_keep_the_limit_the_lowest_peak_is_shown() -> None:
    """A limit that the grid can't reach is not passed over."""
    grid = [knobs(256, 3900.0, 9.0), knobs(512, 3700.0, 20.0), knobs(1024, 3800.0, 1.0)]
    assert searches.best_knobs(grid, 3500.0).batched_tokens == 512


@pytest.mark.parametrize("share", [0.0, 0.31, 0.68, 0.999, 1.5])
def test_the_highest_clock_that_keeps_the_limit_is_found(share: float) -> None:
    """Against trying them all, with no more than five runs for sixteen steps."""
    ladder = searches.clock_ladder(RACK)
    watts = [1000.0 + 3000.0 * hertz / ladder[-1] for hertz in ladder]
    limit = policies.group_limit(1000.0 + 3000.0 * share)
    keeping = [h for h, w in zip(ladder, watts, strict=True) if w <= 1.005 * limit.watts]
    search = searches.highest_clock(RACK, limit)
    asked: list[Outcome] | None = None
    try:
        while True:
            (run,) = search.send(asked)  # type: ignore[arg-type]
            asked = [outcome([1000.0 + 3000.0 * (run.what.gpu_clock_hertz or 0.0) / ladder[-1]])]
    except StopIteration as stop:
        found = stop.value
    assert found[-1].hertz == (keeping[-1] if keeping else ladder[0])
    assert len(found) <= 5


# --- what is kept


def test_a_stored_run_comes_back_as_it_was(tmp_path: Path) -> None:
    """Figures that were not measured and arrays as well."""
    store, found = Store(tmp_path / "runs"), outcome([1.0, 2.0], itl_p99_seconds=math.nan)
    store.save("a", found)
    back = store.load("a")
    assert back is not None
    assert math.isnan(back.itl_p99_seconds)
    assert back.arrays.true_means.tolist() == [1.0, 2.0]
    assert replace(back, arrays=found.arrays, itl_p99_seconds=0.0) == replace(
        found, itl_p99_seconds=0.0
    )
    store.clear()
    assert store.load("a") is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not a file of arrays"])
def test_a_torn_file_is_a_run_that_is_not_done(tmp_path: Path, content: bytes) -> None:
    """A machine went down while it wrote: the run is done again."""
    store = Store(tmp_path)
    (tmp_path / "a.npz").write_bytes(content)
    assert store.load("a") is None
    store.save("a", outcome())
    assert store.load("a") is not None


def test_a_run_is_known_by_all_that_it_follows_from(tmp_path: Path) -> None:
    """Rack, traffic, plant and the files it names; equal ones made anew are the same run."""
    profile = tmp_path / "gpu.toml"
    profile.write_text("one")
    bent = [variant.change(RACK) for variant in variants.VARIANTS]
    other = Workload("two requests", (*WORKLOAD.requests[:1], TimedRequest(1.0, 8, 3)))
    names = [run_name(setup, WORKLOAD) for setup in (*bent, replace(RACK, seed=1))]
    names += [run_name(RACK, other), run_name(replace(RACK, gpu=str(profile)), WORKLOAD)]
    profile.write_text("two")
    names.append(run_name(replace(RACK, gpu=str(profile)), WORKLOAD))
    assert len(set(names)) == len(names)
    again = [run_name(variant.change(RACK), WORKLOAD) for variant in variants.VARIANTS]
    assert again == names[: len(again)]
    # An address in memory is of no use in the next process.
    assert not any("0x" in plant_text(setup.plant) for setup in bent)


def test_a_run_that_two_searches_ask_for_is_done_once(
    asked: list[RackSetup], tmp_path: Path
) -> None:
    """And each of them gets it."""

    def search() -> pool.Search[float]:
        (found,) = yield [Run("a", RACK)]
        return float(found.peak_watts)

    with rack_runner(WORKLOAD, Store(tmp_path), 1) as runner:
        assert runner.drive([search(), search()]) == [5000.0, 5000.0]
    assert len(asked) == 1


def test_every_policy_has_a_row_at_every_limit(asked: list[RackSetup], tmp_path: Path) -> None:
    """In the order of limits and policies; the chunks, which know no limit, run once."""
    with rack_runner(WORKLOAD, Store(tmp_path), 1) as runner:
        found = plan.compare(runner, RACK, (0.9, 0.7))
    rows = [(x.limit_ratio, x.policy) for x in found.entries if not math.isnan(x.limit_ratio)]
    assert rows == [(ratio, name) for ratio in (0.9, 0.7) for name in policies.ORDER[2:]]
    assert sum(setup.policy == "latency-chunk" for setup in asked) == 1
    clocks = [x for x in found.entries if x.policy == policies.CLOCK]
    assert all(x.outcome is not None and x.outcome.keeps(x.limit_watts) for x in clocks)
    shares = [x.limits[0].watts for x in asked if x.shaped and not x.shared and x.limits]
    assert set(shares) == {4500.0 / 8, 3500.0 / 8}


def test_a_policy_that_cannot_run_is_a_row_that_says_why(
    asked: list[RackSetup], tmp_path: Path
) -> None:
    """A cap below what the driver takes; the others go on."""
    with rack_runner(WORKLOAD, Store(tmp_path), 1) as runner:
        found = plan.compare(runner, RACK, (0.3,))
    (cap,) = [each for each in found.entries if each.policy == policies.CAP]
    assert cap.outcome is None
    assert "outside" in cap.detail
    assert len(found.entries) == len(policies.ORDER)


def test_a_limit_below_the_floor_is_refused_with_the_floor(
    asked: list[RackSetup], tmp_path: Path
) -> None:
    """Before minutes are spent on the others."""
    with (
        rack_runner(WORKLOAD, Store(tmp_path), 1) as runner,
        pytest.raises(ConfigError, match=r"draws 1120 W between steps"),
    ):
        plan.compare(runner, RACK, (0.9, 0.2))
    assert len(asked) == 2


def test_what_was_stopped_goes_on_where_it_was(
    asked: list[RackSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after 7 of 25 runs: the rest is run, and no rack twice; then nothing is left."""

    def stopped(setup: RackSetup) -> Outcome:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(setup)
        return fake_rack(setup)

    answer = Inline.answer
    monkeypatch.setattr(Inline, "answer", staticmethod(stopped))
    with pytest.raises(KeyboardInterrupt), rack_runner(WORKLOAD, Store(tmp_path), 1) as runner:
        plan.prove(runner, RACK, range(5))
    kept = len(list(tmp_path.glob("*.npz")))
    monkeypatch.setattr(Inline, "answer", staticmethod(answer))
    told: list[Told] = []
    with rack_runner(WORKLOAD, Store(tmp_path), 1, told.append) as runner:
        found = plan.prove(runner, RACK, range(5))
    assert kept + sum(not each.kept for each in told) == 25
    assert [each.seed for each in found.entries if each.limit_ratio == 0.85] == [0, 1, 2, 3, 4]
    before = len(asked)
    with rack_runner(WORKLOAD, Store(tmp_path), 1) as runner:
        assert plan.prove(runner, RACK, range(5)).seeds == (0, 1, 2, 3, 4)
    assert len(asked) == before


def test_each_variant_is_set_against_itself_unshaped_at_one_limit(
    asked: list[RackSetup], tmp_path: Path
) -> None:
    """The limit in watts stays; the references are the variants' own."""
    with rack_runner(WORKLOAD, Store(tmp_path), 1) as runner:
        found = variants.vary(runner, RACK, tmp_path)
    assert {each.limit_watts for each in found.entries} == {3500.0}
    assert {each.seed for each in found.entries} == set(found.references)
    assert len(found.references) == len(variants.VARIANTS) + len(variants.KNOWN_GAPS_WATTS)
    assert table("t", found.entries, found.references).cases


def test_a_decisions_cost_is_shown_for_smaller_groups_too(
    asked: list[RackSetup], tmp_path: Path
) -> None:
    """32, 16 and 8 engines, each with the same share of the limit."""
    large = replace(RACK, engines=32, duration_seconds=45.0, warm_up_seconds=20.0)
    with rack_runner(WORKLOAD, Store(tmp_path), 1) as runner:
        (sizes,) = runner.drive([plan.group_sizes(large, policies.group_limit(12_800.0))])
    assert [engines for engines, _ in sizes] == [32, 16, 8]
    assert [x.group_limits[0].watts for x in asked] == [12_800.0, 6400.0, 3200.0]
    # They are short, and a warm-up that is longer than they are is none.
    for each in asked:
        check_setup(each)


def test_time_in_the_ledger_is_counted_and_the_ledger_put_back() -> None:
    """Also where it raises."""
    from shaper.group.ledger import GroupLedger

    own = GroupLedger.query
    with ledger_time() as spent, pytest.raises(AttributeError):
        GroupLedger.query(object(), 0.0, 0.0, object())  # type: ignore[arg-type]
    assert spent[0] > 0.0
    assert GroupLedger.query is own
