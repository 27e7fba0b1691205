"""A plain vLLM with the plug-in installed: its flag, the native route, and bad settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import LOGGED, MODEL, Server, free_port, ready, started

pytestmark = pytest.mark.e2e

NATIVE = json.dumps({"power_shaper": {"limits": [{"watts": 520, "window_seconds": 0.1}]}})


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.lstrip("_").startswith("SHAPER")}
    emulated = {"SHAPER_EMULATE": "h200-sxm", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return clean | LOGGED | emulated


def vllm_command(port: int, *flags: str) -> list[str]:
    """A plain vLLM server; only the executor is the emulated GPU's."""
    from shaper.emulator.models import model_directory

    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_directory(MODEL)), "--served-model-name", MODEL),
        *("--distributed-executor-backend", "shaper.emulator.executor.EmulatedExecutor"),
        *("--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy"),
        *("--max-model-len", "4096", "--async-scheduling", *flags),
    ]


def plain_vllm(directory: Path, *flags: str) -> AbstractContextManager[Server]:
    port = free_port()
    return ready(started(vllm_command(port, *flags), port, directory, environment()))


def test_a_plain_vllm_is_shaped(tmp_path: Path) -> None:
    """By vLLM's own flags alone; the plug-in's flag has its server in `test_control.py`."""
    flags = ("--scheduler-cls", "shaper.PowerScheduler", "--additional-config", NATIVE)
    with plain_vllm(tmp_path, *flags) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client:
            answer = client.completions.create(model=MODEL, prompt="hi", max_tokens=12)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        assert server.metric("shaper_steps_total") >= 12
        assert server.metric("shaper_power_limit_watts") == 520.0


def test_help_shows_the_flag() -> None:
    """vLLM's own --help lists it."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--help=all"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=120,
    )
    assert "--power-shaper-config" in done.stdout


def test_bad_settings_stop_the_start_with_one_line() -> None:
    """Exit code 2 and one line on stderr, no traceback."""
    done = subprocess.run(
        vllm_command(free_port(), "--power-shaper-config", '{"limts": []}'),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "did you mean 'limits'" in error
