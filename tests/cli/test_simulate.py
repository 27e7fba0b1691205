"""`shaper simulate`: what it refuses, and what it prints and writes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shaper.cli import main, simulate
from shaper.cli.simulate_arguments import build_parser, setup_of
from shaper.core.types import PowerLimit
from shaper.simulate.bar import ProgressBar
from shaper.simulate.search import Factors, search_limit
from shaper.simulate.setup import NO_ERRORS, RackResult, RackSetup
from tests.simulate.test_rack_figures import engine


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail before it simulates anything; returns its one line."""
    assert main.main(["simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("shaper: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "predictiv"], "did you mean 'predictive'"),
        (["--router", "leastloaded"], "did you mean 'least-loaded'"),
        (["--format", "azur"], "did you mean 'azure'"),
        (["--gpu", "h200"], "h200"),
        (["--model", "llama-9"], "llama-9"),
        (["--group-limit", "1000W@100ms"], "floor: the group of 8 engines draws 1120 W"),
        (["--engines", "1", "--power-limit", "140W@100ms"], "floor: an engine draws 140 W"),
        (["--group-limit", "4000W"], "no window"),
        (["--group-limit", "4kW@100ms,5kW@100ms"], "twice"),
        (["--group-limit", "4kW@1s", "--host-overhead", "1800W"], "no efficiency"),
        (["--psu-efficiency", "0.94"], "there is no group"),
        (["--gpu-clock", "9GHz"], "MHz"),
        (["--gpu-power-cap", "5W"], "power cap 5 W is outside"),
        (["--duration", "0s"], "not above 0"),
        (["--warm-up", "2s"], "leaves less than a second"),
        (["--rate-scale", "0"], "not above 0"),
        (["--engines", "0"], "whole number"),
        (["--engines", "1000"], "1 to 256 engines"),
        (["--rate-scale", "1e9"], "requests would arrive"),
        (["--policy", "static"], "no cap"),
        (["--policy", "reactive"], "no limit to react to"),
        (["--objective", "efficiency"], "ITL target"),
        (["--report", "out.txt"], "must end in .html"),
        (["--json", "no/such/place.json"], "no directory"),
        (["--search-limit", "--ttft-factor", "0.5"], "below 1"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(capsys, arguments, said):
    """Before minutes are spent on it, with what is wrong and what is right."""
    assert said in refused(capsys, "--duration", "2s", *arguments)


def test_a_broken_trace_names_its_line(capsys, tmp_path):
    """With the file and what is wrong in it."""
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,10,many\n")
    line = refused(capsys, "--trace", str(path), "--format", "azure")
    assert "line 2" in line
    assert "many" in line


def test_the_flags_are_the_setup():
    """Each reaches the rack in the unit of its name."""
    line = (
        "--engines 4 --gpu h100-sxm --model qwen3-8b --rate-scale 0.5 --duration 2min --warm-up 5s "
        "--policy predictive --power-limit 500W@100ms --group-limit 1.9kW@100ms,1800W@1s "
        "--gpu-power-cap 500W --gpu-clock 1200MHz --ttft-target 1s --itl-target 50ms --seed 3 "
        "--router headroom --objective efficiency --max-num-batched-tokens 2048 "
        "--max-num-seqs 64 --tp 2 --exact"
    )
    arguments = build_parser().parse_args(line.split())
    assert setup_of(arguments) == RackSetup(
        gpu="h100-sxm",
        model="qwen3-8b",
        tensor_parallel=2,
        engines=4,
        duration_seconds=120.0,
        warm_up_seconds=5.0,
        rate_scale=0.5,
        router="headroom",
        seed=3,
        limits=(PowerLimit(500.0, 0.1),),
        group_limits=(PowerLimit(1900.0, 0.1), PowerLimit(1800.0, 1.0)),
        itl_target_seconds=0.05,
        ttft_target_seconds=1.0,
        objective="efficiency",
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        gpu_power_cap_watts=500.0,
        gpu_clock_hertz=1.2e9,
        errors=NO_ERRORS,
    )


def test_a_limit_at_the_wall_is_taken_to_the_gpus():
    """As a live server does it."""
    line = "--group-limit 6kW@100ms --host-overhead 1800W --psu-efficiency 0.95"
    (limit,) = setup_of(build_parser().parse_args(line.split())).group_limits
    assert limit == PowerLimit(3900.0, 0.1)


def test_a_reactive_engine_gets_its_share_of_the_group():
    """It knows no ledger: an even share is its own limit."""
    arguments = build_parser().parse_args(
        ["--policy", "reactive", "--group-limit", "4000W@100ms", "--engines", "8"]
    )
    setup = setup_of(arguments)
    assert setup.limits == (PowerLimit(500.0, 0.1),)
    assert not setup.shared


def test_a_run_prints_and_writes_its_figures(capsys, tmp_path):
    """The command as an operator runs it, in small."""
    found, report = tmp_path / "out.json", tmp_path / "out.html"
    arguments = "--engines 2 --duration 2s --group-limit 900W@100ms --itl-target 100ms --seed 1"
    code = main.main(
        ["simulate", *arguments.split(), "--json", str(found), "--report", str(report)]
    )
    assert code == 0
    captured = capsys.readouterr()
    assert "engine 1" in captured.out
    assert "group, 900W@100ms" in captured.out
    assert captured.err == ""  # no bar where there is no terminal
    data = json.loads(found.read_text())
    assert len(data["engines"]) == 2
    assert data["setup"]["group_limits"] == ["900W@100ms"]
    assert report.read_text().startswith("<!DOCTYPE html>")


def test_a_group_near_its_gpus_cap_stays_below_its_limit(capsys, tmp_path):
    """Eight B200 over the limit's traffic, whose clocks sag under the driver's cap and climb
    again. The limit is 0.7 of the peak that the same command has without it, over 60 s."""
    found = tmp_path / "out.json"
    line = (
        "--trace conversation --engines 8 --gpu b200-sxm --model qwen3-32b --duration 3s --seed 7 "
        "--itl-target 100ms --group-limit 5804W@100ms --json"
    )
    assert main.main(["simulate", *line.split(), str(found)]) == 0
    group = json.loads(found.read_text())["group"]
    assert group["mean_watts"] > 0.8 * 5804.0  # the limit binds
    assert group["metered_highest_window_ratio"]["5804W@100ms"] <= 1.005
    assert group["highest_window_ratio"]["5804W@100ms"] <= 1.005


def test_an_interrupted_run_says_so_in_a_line(capsys, monkeypatch):
    """Runs take minutes, and people lose patience."""

    def interrupted(*arguments: Any) -> RackResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "_run", interrupted)
    assert main.main(["simulate", "--duration", "2s", "--engines", "1"]) == 130
    assert capsys.readouterr().err == "shaper: interrupted: nothing is written\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_on_a_terminal_and_goes_away():
    """What is printed after it stands on a clean line."""
    stream = Terminal()
    with ProgressBar(stream) as bar:
        bar.update(30.0, 60.0, 12)
    assert " 50%  30 of 60 s, 12 requests" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")
    for silent in (ProgressBar(io.StringIO()), ProgressBar(Terminal(), shown=False)):
        silent.update(30.0, 60.0, 12)
        silent.clear()
        assert silent._stream.getvalue() == ""  # type: ignore[attr-defined]


# --- the search, over a rack whose latency is known


def known(setup: RackSetup) -> RackResult:
    """TTFT grows as the limit falls: 1.25 times at 800 W of 1000 W."""
    watts = setup.group_limits[0].watts if setup.group_limits else 1000.0
    ttft = 0.1 * (1.0 + (1000.0 - watts) / 800.0)
    one = engine(np.full(2000, min(watts, 1000.0)))
    one = replace(
        one,
        arrival_seconds=np.zeros(3),
        first_token_seconds=np.full(3, ttft),
        last_token_seconds=np.full(3, 1.0),
    )
    return RackResult(setup, "known", (one,), 0, 1.0)


def search(**changes: Any) -> Any:
    setup = RackSetup(engines=1, duration_seconds=2.0, **changes)
    return search_limit(setup, known, 140.0, Factors(1.25, 1.25))


def test_the_search_finds_the_lowest_good_limit():
    """To a hundredth of the unshaped peak, and shows what it tried."""
    found = search()
    assert found.lowest is not None
    assert 800.0 <= found.lowest.watts <= 812.0
    assert found.result.setup.group_limits == (found.lowest,)
    assert all(probe.failed == ("ttft",) for probe in found.probes if probe.limit.watts < 800.0)
    assert all(not probe.failed for probe in found.probes if probe.limit.watts > 800.0)


def test_no_limit_may_be_good():
    """Then the figures are the unshaped ones."""

    def slow(setup: RackSetup) -> RackResult:
        result = known(setup)
        if not setup.shaped:
            return result
        one = replace(
            result.engines[0],
            output_tokens=np.array([1, 1, 0]),
            token_seconds=np.array([0.3, 0.4]),
        )
        return replace(result, engines=(one,))

    found = search_limit(
        RackSetup(engines=1, duration_seconds=2.0), slow, 140.0, Factors(1.25, 1.25)
    )
    assert found.lowest is None
    assert not found.result.setup.shaped
    assert all("throughput" in probe.failed for probe in found.probes)


def test_an_itl_target_is_the_bound_where_it_is_the_higher_one():
    """Whoever names a target has said how far ITL may grow."""

    def spent(setup: RackSetup) -> RackResult:
        result = known(setup)
        gaps = np.full(5, 0.09 if setup.shaped else 0.03)
        counts = np.array([5, 0, 0])
        one = replace(result.engines[0], token_seconds=np.cumsum(gaps), output_tokens=counts)
        return replace(result, engines=(one,))

    strict, spending = (
        search_limit(
            RackSetup(engines=1, duration_seconds=2.0, itl_target_seconds=target),
            spent,
            140.0,
            Factors(1.25, 1.25),
        )
        for target in (None, 0.1)
    )
    assert strict.lowest is None
    assert spending.lowest is not None


def test_the_found_limit_is_printed(capsys, monkeypatch, tmp_path):
    """Each probe as it comes, then the answer; the JSON has both."""
    monkeypatch.setattr(simulate, "_run", lambda setup, workload, bar: known(setup))
    out = tmp_path / "o.json"
    line = f"simulate --engines 1 --search-limit --duration 2s --warm-up 0 --json {out}"
    assert main.main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "lowest good limit: 80" in printed
    data = json.loads(out.read_text())["search"]
    assert f"{data['lowest_limit_watts']:g}W@100ms" in printed
    assert len(data["probes"]) == printed.count("of the unshaped peak)")


def test_latency_that_was_not_measured_is_not_good():
    """A run in which no request got a token after the warm-up proves nothing."""
    found = search(warm_up_seconds=1.0)  # all requests of `known` come at 0
    assert found.lowest is None
    assert all("ttft" in probe.failed for probe in found.probes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--power-limit 1800W@1s --tp 2", ["each engine: power limit 1800 W over 1 s"]),
        ("--group-limit 3kW@1s --tp 2", ["group: power limit 3000 W over 1 s"]),
        ("--group-limit 1500W@1s --gpu-power-cap 350W --tp 2", ["group: power limit 1500 W"]),
        ("--group-limit 2500W@1s,2900W@10ms --power-limit 1300W@1s --tp 2", []),
    ],
)
def test_a_limit_that_can_never_bind_is_said(capsys, monkeypatch, arguments, said):
    """The run goes on: it may be what is to be seen."""

    def interrupted(*arguments: Any) -> RackResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "_run", interrupted)
    line = f"simulate --duration 2s --engines 2 {arguments}"
    assert main.main(line.split()) == 130
    *warnings, _ = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(said)
    for warning, start in zip(warnings, said, strict=True):
        assert warning.startswith(f"shaper: warning: {start}")
        assert "can never bind: the enforced limit of all" in warning
