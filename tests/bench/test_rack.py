"""The comparison of a rack: its rows and aims, its command, and one short run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import rack as command
from bench.harness.aims import verdicts
from bench.racks import plan, policies
from bench.racks.page import curves
from bench.racks.rows import Entry, aimed, figures, table
from shaper.simulate.setup import RackSetup
from tests.bench.rack_fakes import RACK, REFERENCE, fake_pool, outcome


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RackSetup]:
    """The racks that were run, in order; `fake_rack` answers."""
    return fake_pool(monkeypatch)


# --- rows


def test_a_row_is_set_against_the_unshaped_racks() -> None:
    """Ratios are to the unshaped rack, and the ITL's to that with small batches."""
    found = outcome(
        [3400.0, 3500.0, 3510.0, 3600.0],
        output_tokens_per_second=990.0,
        ttft_p99_seconds=0.25,
        itl_p99_seconds=0.06,
        tokens_per_joule=0.56,
    )
    row = figures(Entry("any", found, 0, 0.70, 3500.0), REFERENCE)
    assert row["peak_ratio"] == pytest.approx(3600 / 3500)
    assert row["throughput_ratio"] == pytest.approx(0.99)
    assert row["ttft_p99_ratio"] == pytest.approx(1.25)
    assert row["itl_p99_small_ratio"] == pytest.approx(1.2)
    assert row["tokens_per_joule_ratio"] == pytest.approx(1.12)


def test_windows_count_as_over_from_half_a_percent_on_metered_and_true_apart() -> None:
    """3,510 W is within 0.5% of 3,500 W, and a meter that shows 2% less hides the rest."""
    found = outcome([3400.0, 3510.0, 3560.0, 3600.0], metered_ratio=0.98)
    row = figures(Entry("any", found, 0, 0.70, 3500.0), REFERENCE)
    assert row["over_true_share"] == pytest.approx(0.5)
    assert row["over_metered_share"] == pytest.approx(0.25)


def test_what_was_not_measured_is_a_dash() -> None:
    """A policy that can't run, a rack without a limit, and no window at all."""
    entries = [
        Entry(policies.CAP, None, 0, 0.70, 3500.0, "not possible: too low"),
        Entry(policies.UNSHAPED, REFERENCE.unshaped),
        Entry("short", outcome(itl_p99_seconds=math.nan), 0, 0.70, 3500.0),
    ]
    shown = table("t", entries, {0: REFERENCE})
    texts = [[column.text(case) for column in shown.columns] for case in shown.cases]
    assert texts[0] == ["0.70", *["-"] * 12]
    assert texts[1][0] == texts[1][1] == texts[1][2] == "-"
    assert texts[2][6] == texts[2][7] == "-"
    assert shown.cases[0].name == "power cap (not possible: too low)"


def test_the_worst_seed_is_judged() -> None:
    """One seed of two misses the TTFT aim: the aim is missed, and by that seed."""
    name = policies.shared_name(0.1)
    entries = [
        Entry(name, outcome([3500.0], tokens_per_joule=0.6), 0, 0.70, 3500.0),
        Entry(
            name,
            outcome([3500.0], ttft_p99_seconds=0.26, tokens_per_joule=0.6),
            1,
            0.70,
            3500.0,
        ),
    ]
    (section,) = aimed(entries, {0: REFERENCE, 1: REFERENCE})
    found = {each.figure: each for each in verdicts(section)}
    assert not found["p99 TTFT x"].met
    assert found["p99 TTFT x"].case == "seed 1"
    assert found["p99 TTFT x"].worst == pytest.approx(1.3)
    assert all(each.met for name, each in found.items() if name != "p99 TTFT x")


def test_a_window_over_the_limit_misses_its_aim() -> None:
    """The aim of windows over is none at all."""
    entry = Entry(policies.shared_name(None), outcome([4300.0, 4250.0]), 0, 0.85, 4250.0)
    (section,) = aimed([entry], {0: REFERENCE})
    assert [each.figure for each in verdicts(section) if not each.met] == [
        "windows over, metered %"
    ]


@pytest.mark.parametrize("changes", [{"engines": 2}, {"duration_seconds": 10.0}])
def test_small_groups_and_short_runs_are_not_judged(changes: dict[str, Any]) -> None:
    """The aims are about groups that have somebody to take turns with, and about tails."""
    entry = Entry(policies.shared_name(None), outcome(**changes), 0, 0.85, 4250.0)
    assert aimed([entry], {0: REFERENCE}) == []


def test_a_policy_that_breaks_the_limit_is_drawn_hollow() -> None:
    """Its latency would look like a gain otherwise."""
    entries = [
        Entry(policies.CAP, outcome([watts]), 0, ratio, 5000.0 * ratio)
        for ratio, watts in ((0.9, 4500.0), (0.7, 3800.0))
    ]
    comparison = plan.Comparison(RACK, (0,), {0: REFERENCE}, entries)
    (trace,) = curves(comparison, "ttft_p99_ratio", "TTFT").data
    assert list(trace.marker.symbol) == ["circle", "circle-open"]


# --- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limits", "1.2"], "above 0 and below 1"),
        (["--limits", "0.9,x"], "is not like 0.9,0.7"),
        (["--full", "--limits", "0.8"], "limits of their own"),
        (["--full", "--quick"], "not allowed with"),
        (["--gpu", "h2000"], "h2000"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--engines", "0"], "whole number from 1"),
        (["--rate", "0"], "not above 0"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--json", "missing/x.json"], "can't be written"),
        (["--qui"], "unrecognized"),
    ],
)
def test_a_wrong_argument_is_said_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, before anything is run."""
    assert command.main([*arguments, "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith("bench.rack: error: ")
    assert not list(tmp_path.rglob("*.npz"))


def test_a_folder_that_cannot_be_made_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a file stands in its place."""
    (tmp_path / "out").write_text("")
    assert command.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    assert "can't be made" in capsys.readouterr().err


def test_without_the_reference_trace_drawn_traffic_is_used_and_said(
    asked: list[RackSetup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the terminal and in the table; the figures then come from it."""
    monkeypatch.setattr(command, "REFERENCE_TRACE", tmp_path / "missing.csv")
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "drawn conversation" in capsys.readouterr().out
    assert "drawn conversation" in (tmp_path / "table.md").read_text()
    assert asked[0].rate_scale == pytest.approx(1.0, rel=0.5)


def test_a_large_group_shows_what_a_decision_costs(asked: list[RackSetup], tmp_path: Path) -> None:
    """For half of it as well; it runs for less time than eight engines do."""
    arguments = ["--engines", "16", "--limits", "0.7", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert asked[0].duration_seconds == 60.0
    text = (tmp_path / "table.md").read_text()
    assert "shared ledger, 16 engines: 50 us a decision, 3.12 us a decision and engine" in text
    assert "shared ledger, 8 engines: 50 us a decision" in text


def test_full_fails_when_an_aim_is_missed(asked: list[RackSetup], tmp_path: Path) -> None:
    """The fake rack's TTFT is too high at 0.70; the table says which."""
    assert command.main(["--full", "--duration", "10", "--out", str(tmp_path)]) == 1
    assert "MISSED" in (tmp_path / "table.md").read_text()
    data = json.loads((tmp_path / "figures.json").read_text())
    assert any(not each["met"] for each in data["aims"])


def test_the_quick_comparison_runs_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real schedulers in a process of their own: all rows, and the report with its plots."""
    arguments = ["--quick", "--duration", "3", "--processes", "1", "--out", str(tmp_path)]
    copy = tmp_path / "copy.json"
    assert command.main([*arguments, "--json", str(copy)]) == 0
    shown = capsys.readouterr()
    data = json.loads(copy.read_text())
    rows = {row["policy"]: row for row in data["rows"]}
    assert set(rows) == set(policies.ORDER)
    assert all(rows[name]["run"]["shaper_errors"] == 0 for name in rows)
    assert rows[policies.shared_name(0.1)]["metered_peak_ratio"] < 1.05
    assert rows[policies.UNSHAPED]["run"]["output_tokens_per_second"] > 0.0
    assert "engine-seconds a second" in shown.err
    page = (tmp_path / "report.html").read_text()
    assert page.count("shaperPlot('plot") == 5
    assert "https://" not in page
    # The same command again has nothing left to run.
    assert command.main(arguments) == 0
    again = json.loads((tmp_path / "figures.json").read_text())
    assert all(each["kept"] for each in again["runs"])
    assert again["rows"] == data["rows"]
