"""Shaping never changes tokens: the real CPU model runner, with every lever pulled at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu_engine

RUNNER = Path(__file__).with_name("real_runner.py")


def run(mode: str, model: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHAPER_")}
    done = subprocess.run(
        [sys.executable, str(RUNNER), mode, str(model)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{mode} printed no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


@pytest.mark.timeout(600)
def test_greedy_tokens_are_equal_under_random_levers(tmp_path):
    """Pauses, chunks, held decodes and stopped entries leave every greedy token as it was."""
    plain, shaped = run("plain", tmp_path), run("shaped", tmp_path)
    assert shaped["errors"] == 0
    assert shaped["controllers"] == 1
    assert all(count >= 20 for count in shaped["fired"].values()), shaped["fired"]
    distinct = {token for tokens in plain["tokens"] for token in tokens}
    assert len(distinct) > 50  # the model's answers vary, so the comparison means something
    assert shaped["tokens"] == plain["tokens"]
