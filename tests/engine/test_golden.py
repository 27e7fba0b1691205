"""Golden decisions: what a refactor must reproduce line by line."""

from __future__ import annotations

import pytest

from tests.engine import golden_traces
from tests.engine.golden_traces import FOLDER, SCRIPTS

AGAIN = "if this is meant: python -m tests.engine.golden_traces, and the reason into CHANGELOG.md"
# Small enough to be read in a review.
MAX_BYTES = 40_000


@pytest.mark.parametrize("name", SCRIPTS)
def test_decisions_are_those_on_file(name):
    """Counts, reasons, decodes, prompt tokens and watts of every step, in their order."""
    found = golden_traces.trace(golden_traces.decide(name)).splitlines()
    kept = (FOLDER / f"{name}.csv").read_text().splitlines()
    first = next((i for i, (a, b) in enumerate(zip(found, kept, strict=False)) if a != b), None)
    if first is not None:
        pytest.fail(f"{name}.csv, line {first + 1}: {kept[first]} is now {found[first]}; {AGAIN}")
    assert len(found) == len(kept), f"{name}.csv has {len(kept)} lines, now {len(found)}; {AGAIN}"


def test_every_file_has_its_script_and_all_are_small():
    """No trace is left over, and a review can read them."""
    files = sorted(FOLDER.glob("*.csv"))
    assert [path.stem for path in files] == sorted(SCRIPTS)
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_the_scripts_reach_the_planners_reasons():
    """Together they pull every lever that a planner has, or the files would prove little."""
    reasons = {
        line.split(",")[1]
        for path in FOLDER.glob("*.csv")
        for line in path.read_text().splitlines()[1:]
    }
    assert reasons >= {
        *("unconstrained", "chunk_power", "chunk_itl", "decode_only"),
        *("itl_slack", "decode_pacing", "pause", "prefill_overdue", "idle"),
    }


def test_a_trace_tells_steps_apart():
    """A single token more in one step is another trace."""
    decisions = golden_traces.decide("bursts")
    middle = len(decisions) // 2
    one = decisions[middle]
    changed = one._replace(prefill_tokens=one.prefill_tokens + 1)
    other = [*decisions[:middle], changed, *decisions[middle + 1 :]]
    assert golden_traces.trace(other) != golden_traces.trace(decisions)
