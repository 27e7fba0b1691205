"""Reading the decision log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bench.harness.decisions import read_decision_log


def test_lines_become_columns(tmp_path: Path) -> None:
    """Numbers are columns; null and a missing key are NaN."""
    path = tmp_path / "log.jsonl"
    rows = [
        {"t": 1.0, "reason": "pause", "prefill_tokens": 0, "headroom_watts": None},
        {"t": 2.0, "reason": "chunk_power", "prefill_tokens": 512, "headroom_watts": 12.5},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = read_decision_log(path)
    assert log is not None
    assert log.reasons == ("pause", "chunk_power")
    assert log.prefill_tokens.tolist() == [0.0, 512.0]
    assert np.isnan(log.headroom_watts[0])
    assert np.isnan(log.meter_watts).all()


def test_broken_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    """A line cut off when the server ended does not cost the others."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"t": 1.0, "reason": "pause"}\n[]\n{"reason": "x"}\n{"t": 2.0, "rea')
    log = read_decision_log(path)
    assert log is not None
    assert log.reasons == ("pause",)
    assert log.skipped_lines == 3


def test_no_log_is_no_error(tmp_path: Path) -> None:
    """An unshaped server writes none; an empty one holds none."""
    assert read_decision_log(tmp_path / "none") is None
    (tmp_path / "empty").touch()
    assert read_decision_log(tmp_path / "empty") is None


def test_a_run_is_cut_out(tmp_path: Path) -> None:
    """Decisions before and after the run, such as the warm-up's, are left out."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"t": {t}, "reason": "r{t}"}}\n' for t in range(10)))
    log = read_decision_log(path)
    assert log is not None
    part = log.between(3.0, 5.0)
    assert part.reasons == ("r3", "r4", "r5")
    assert part.times.tolist() == [3.0, 4.0, 5.0]
