"""The overhead benchmark: every state and size gets a row; wrong input is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHAPER_")}
    return subprocess.run(
        [sys.executable, "-m", "bench.overhead", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        check=False,
        timeout=240,
    )


def test_it_measures_every_state(tmp_path):
    """A small run prints a table and writes the same figures as JSON."""
    pytest.importorskip("vllm")
    done = run("--sizes", "1,8", "--steps", "10", "--json", str(tmp_path / "costs.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert [(cost["running"], cost["state"]) for cost in costs] == [
        (size, state)
        for size in (1, 8)
        for state in ("no limit", "loose limits", "binding limit", "long queue")
    ]
    assert all(cost["own_microseconds"] > 0 for cost in costs)
    assert done.stdout.count("\n| 8 |") == 4
    assert all(line.startswith("|") for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [("--sizes", "0"), ("--sizes", "many"), ("--steps", "0"), ("--steps", "0", "--memory")],
)
def test_wrong_input_is_one_line(arguments):
    """Exit code 2 and the flag's name."""
    done = run(*arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert "Traceback" not in done.stderr
