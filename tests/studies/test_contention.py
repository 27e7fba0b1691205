"""The cost of sharing: the command runs, counts what it should, and refuses nonsense."""

from __future__ import annotations

import json

import pytest

from bench.studies import contention


def test_one_engine_and_two_take_their_steps(tmp_path, capsys):
    """Each engine queries, reserves and commits, and the table has a line for each number."""
    path = tmp_path / "costs.json"
    code = contention.main(["--engines", "1,2", "--steps", "10", "--json", str(path)])
    assert code == 0
    costs = json.loads(path.read_text())
    found = [(cost["engines"], cost["windows"]) for cost in costs]
    assert found == [(1, 1), (2, 1), (1, 2), (2, 2)]
    for cost in costs:
        assert cost["query_p99_microseconds"] >= cost["query_microseconds"] > 0.0
        assert cost["reserve_microseconds"] > 0.0
        assert 0.0 <= cost["static_ratio"] <= 1.0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(costs)
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--engines", "0"], ["--engines", "65"], ["--engines", "two"], ["--steps", "1"]],
)
def test_nonsense_is_refused_in_one_line(arguments, capsys):
    """With code 2, before anything runs."""
    assert contention.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
