"""The command of the controller's figures: its arithmetic, its verdicts, and one short run."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest

os.environ["SHAPER_EMULATE"] = "h200-sxm"
os.environ["HF_HUB_OFFLINE"] = "1"

from bench import control
from bench.acceptance import policy_comparison, slack, step
from bench.acceptance.signals import cycle_watts, limits_text, over_budget, peak_to_peak_watts
from bench.acceptance.traffic import conversation, even_lengths
from bench.baselines.static import StaticCaps
from bench.harness.aims import Case, Column, Job, Section, aligned, cases, verdicts
from bench.harness.virtual import Setup, VirtualRun
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError
from shaper.traffic.figures import PowerGrid
from shaper.traffic.workload import TimedRequest, Workload

LIMIT = PowerLimit(500.0, 0.1)


def grid(watts) -> PowerGrid:
    return PowerGrid(0.0, np.asarray(watts, dtype=float))


def sine(seconds: float, hertz: float, amplitude: float) -> PowerGrid:
    times = np.arange(round(seconds * 1000)) / 1000.0
    return grid(500.0 + amplitude * np.sin(2 * math.pi * hertz * times))


# --- signals


def test_over_budget_finds_the_worst_limit_and_the_share_of_windows():
    """100 ms at 600 W between 400 W: one window of 100 ms is full of it."""
    watts = [400.0] * 500 + [600.0] * 100 + [400.0] * 500
    worst, share = over_budget(grid(watts), (PowerLimit(900.0, 0.01), LIMIT))
    assert worst == pytest.approx(1.2)
    # Ends 51 to 149 ms after its start see more than half of it.
    assert share == pytest.approx(99 / 1001, abs=2e-3)
    worst, share = over_budget(grid(watts), (LIMIT,), (0.8, 2.0))
    assert (round(worst, 6), share) == (0.8, 0.0)


def test_rounding_is_no_excess():
    """A window at its limit, to a part in ten thousand, is not over."""
    assert over_budget(grid([500.05] * 300), (LIMIT,))[1] == 0.0


def test_a_limit_cycle_is_its_sine_and_not_the_drift():
    """2 Hz with 20 W each way is 40 W peak to peak, whatever the ramp under it."""
    signal = sine(8.0, 2.0, 20.0)
    assert cycle_watts(signal, 0.01, (0.0, 8.0)) == pytest.approx(40.0, rel=0.03)
    flat = grid(np.linspace(400.0, 420.0, 8000))
    assert cycle_watts(flat, 0.1, (0.0, 8.0)) < 1.0
    assert peak_to_peak_watts(flat, 0.1, (0.0, 8.0)) == pytest.approx(20.0, abs=1.0)


def test_what_a_window_hides_is_no_cycle():
    """Steps of 20 ms are not seen over 100 ms."""
    assert cycle_watts(sine(8.0, 50.0, 200.0), 0.1, (0.0, 8.0)) < 1.0


def test_too_short_a_span_is_not_measured():
    """Nothing is reported from no windows."""
    assert math.isnan(cycle_watts(sine(0.2, 2.0, 20.0), 0.1, (0.0, 0.1)))
    assert math.isnan(peak_to_peak_watts(sine(0.2, 2.0, 20.0), 1.0, (0.0, 0.1)))


def test_limits_read_as_an_operator_writes_them():
    """Milliseconds below a second."""
    assert limits_text((LIMIT, PowerLimit(420.4, 3.0))) == "500W@100ms, 420W@3s"


# --- tables


def section(*columns, rows) -> Section:
    return Section("t", columns, cases(rows), "note")


def test_a_verdict_names_the_worst_case():
    """The highest for a cost, the lowest for a gain; what was not measured does not count."""
    table = section(
        Column("cost", "cost", aim=1.0),
        Column("gain", "gain", aim=0.99, higher=True),
        Column("plain", "plain"),
        rows=[
            {"name": "a", "cost": 0.5, "gain": 0.98, "plain": 1.0},
            {"name": "b", "cost": 0.9, "gain": 1.2, "plain": 1.0},
            {"name": "c", "cost": math.nan, "gain": math.nan, "plain": 1.0},
        ],
    )
    cost, gain = verdicts(table)
    assert (cost.case, cost.met, cost.aim) == ("b", True, "<= 1.00")
    assert (gain.case, gain.met, gain.worst_text) == ("a", False, "0.98")


def test_an_infinite_figure_misses_its_aim():
    """A power that never rises again is not left out."""
    (verdict,) = verdicts(section(Column("x", "x", aim=1.0), rows=[{"name": "a", "x": math.inf}]))
    assert not verdict.met


def test_a_scaled_aim_is_printed_in_the_columns_unit():
    """The aim of 50 ms beside a figure in milliseconds."""
    column = Column("itl", "ITL ms", 1, 1e3, aim=0.05)
    (verdict,) = verdicts(section(column, rows=[{"name": "a", "itl": 0.0463}]))
    assert (verdict.aim, verdict.worst_text, verdict.met) == ("<= 50.0", "46.3", True)
    assert column.text(Case("a", {})) == "-"


def test_cells_are_aligned():
    """The table reads without a Markdown viewer."""
    lines = aligned([["", "x"], ["name", "1,234"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ---- | ----: |"


# --- runs


def test_a_replay_goes_on_where_it_stopped():
    """Two calls send each request once, and give what one call gives."""
    requests = tuple(TimedRequest(0.05 * i, 200 + i, 10) for i in range(20))
    whole, halves = VirtualRun(Setup()), VirtualRun(Setup())
    whole.replay(Workload("w", requests))
    halves.replay(Workload("w", requests), 0.5)
    halves.replay(Workload("w", requests))
    assert len(halves.engine.requests) == 20
    assert halves.figures().tokens == whole.figures().tokens == 200
    assert halves.figures().unfinished == 0


def test_a_request_that_never_starts_counts_with_its_wait():
    """A queue that does not move is not left out of TTFT."""
    run = VirtualRun(Setup((PowerLimit(150.0, 0.1),)))
    run.replay(Workload("w", (TimedRequest(0.0, 4000, 5),)), 1.0)
    figures = run.figures()
    assert figures.ttft_seconds.max == pytest.approx(1.0, abs=0.05)
    assert (figures.tokens, figures.unfinished) == (0, 1)


def test_a_crowd_keeps_its_size():
    """As many requests are open as there are clients, at every time."""
    run = VirtualRun(Setup())
    run.crowd(even_lengths(100, 20, 1), 5, 1.0)
    records = run.engine.requests.values()
    assert sum(record.finished_seconds is None for record in records) <= 5
    assert len(records) > 20
    assert len(run.engine.scheduler.requests) == 5
    run.abort_all()
    assert not run.engine.scheduler.requests


def test_joules_are_the_gpus_own():
    """The grid loses none of the emulated GPU's energy."""
    run = VirtualRun(Setup())
    run.replay(conversation(3.0, 8.0, 1), 3.0)
    assert run.grid().joules == pytest.approx(run.engine.gpus.true_joules, rel=0.02)


def test_a_hardware_cap_slows_the_clock_down():
    """The cap reaches the emulated GPU, and its bursts last longer."""
    free, capped = VirtualRun(Setup()), VirtualRun(Setup(power_cap_watts=350.0))
    for run in (free, capped):
        run.replay(Workload("w", tuple(TimedRequest(0.0, 6000, 5) for _ in range(8))))
    assert capped.figures().ttft_seconds.p99 > 1.2 * free.figures().ttft_seconds.p99


# --- the command


def test_the_trace_is_left_out_where_it_is_missing(monkeypatch, tmp_path):
    """A clone without the reference data still runs the synthetic traffic, and says so."""
    monkeypatch.setattr(slack, "TRACE", tmp_path / "none.csv")
    jobs = slack.jobs(quick=False)
    assert {job.arguments[2] for job in jobs} == {None}
    (first, _) = slack.sections([{"name": "x"}], True)
    assert "missing" in first.note


@pytest.mark.parametrize("quick", [True, False])
def test_every_proof_has_work(quick):
    """No list of runs is empty, and the quick ones are fewer."""
    for proof in control.PROOFS.values():
        assert proof.jobs(quick)


def test_the_tuned_caps_are_the_best_that_keep_the_limit(monkeypatch):
    """The lowest p99 TTFT under the limit; where none keeps it, the lowest worst window."""
    found = {
        (64, None): (False, 0.9, 64, 0),
        (128, None): (False, 0.4, 128, 0),
        (256, None): (True, 1.02, 256, 0),
    }

    def tried(_limit, caps, _seed, _seconds):
        return found.get(caps, (True, 1.5, caps[0], caps[1] or 0))

    monkeypatch.setattr(policy_comparison, "_tried", tried)
    setup, name = policy_comparison._tuned(LIMIT, 1, 10.0)
    assert name == " (128 tokens, any running)"
    policy = setup.policy()
    assert isinstance(policy, StaticCaps)
    assert policy._prefill_tokens == 128


def test_settling_is_the_last_window_above_two_percent():
    """From 650 W to 500 W at once, a window of 100 ms is 2% above after 93 ms of it."""
    edge = round(step.DOWN_SECONDS * 1000)
    watts = [650.0] * edge + [500.0] * 8000
    settled = step._settling(grid(watts), LIMIT)
    assert settled == pytest.approx(0.1 * (1 - 10 / 150), abs=2e-3)


def failing(message: str):
    raise ConfigError(message)


@pytest.mark.parametrize(("worst", "code"), [(0.9, 0), (1.1, 1)])
def test_the_exit_code_says_whether_an_aim_is_missed(monkeypatch, capsys, tmp_path, worst, code):
    """And the JSON has what the table has."""
    table = section(Column("x", "x", aim=1.0), rows=[{"name": "a", "x": worst}])
    monkeypatch.setattr(control, "run", lambda *_: [table])
    path = tmp_path / "figures.json"
    assert control.main(["--only", "step", "--json", str(path)]) == code
    text = capsys.readouterr().out
    assert ("MISSED" in text) == bool(code)
    data = json.loads(path.read_text())
    assert data["aims"][0]["met"] is not bool(code)
    assert data["sections"][0]["cases"][0]["figures"]["x"] == worst


def test_the_document_is_what_was_printed(monkeypatch, capsys, tmp_path):
    """With the command, the date and the machine above it."""
    table = section(Column("x", "x", aim=1.0), rows=[{"name": "a", "x": 1.1}])
    monkeypatch.setattr(control, "run", lambda *_: [table])
    monkeypatch.setattr(control, "DOCUMENT", tmp_path / "figures.md")
    assert control.main(["--write"]) == 1
    header, _, rest = control.DOCUMENT.read_text().partition("\n0 of 1 aims met.")
    assert capsys.readouterr().out == f"0 of 1 aims met.{rest}"
    assert "python -m bench.control --write" in header
    assert "CPUs" in header


@pytest.mark.parametrize("part", [["--quick"], ["--only", "step"]])
def test_a_part_is_no_document(part):
    """What was left out would be missing from the file without a word."""
    assert control.main(["--write", *part]) == 2


def test_what_cannot_run_is_said_in_one_line(monkeypatch, capsys):
    """No traceback for an operator."""
    monkeypatch.setattr(control, "run", lambda *_: failing("no such profile"))
    assert control.main(["--only", "step"]) == 2
    assert capsys.readouterr().err == "bench.control: error: no such profile\n"


def test_the_pool_runs_jobs_in_order_of_their_lists(monkeypatch):
    """Answers go back to their places, whichever is done first."""
    for name, letters in (("step", "ab"), ("cost", "c")):
        proof = SimpleNamespace(
            jobs=lambda quick, letters=letters: [Job(named, (letter,)) for letter in letters],
            sections=lambda results, quick: [section(Column("x", "x"), rows=results)],
        )
        monkeypatch.setitem(control.PROOFS, name, proof)
    first, second = control.run(["step", "cost"], True, 1)
    assert [case.name for case in first.cases] == ["a", "b"]
    assert [case.name for case in second.cases] == ["c"]


def named(name: str) -> dict[str, object]:
    """What a job hands back."""
    return {"name": name, "x": 1.0}
