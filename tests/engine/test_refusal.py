"""An engine core that refuses to start ends the server with one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shaper.engine import refusal
from shaper.errors import EngineError
from shaper.ipc.status_block import RUN_VARIABLE, refusal_path, run_id

CORE = """
import multiprocessing, sys
from shaper.engine.refusal import refuse, show_refusals
from shaper.errors import EngineError

def core():
    refuse(EngineError("no schedule\\ncan keep it"))

def serve():
    show_refusals()
    process = multiprocessing.get_context("spawn").Process(target=core, name="EngineCore_DP0")
    process.start()
    process.join()
    assert process.exitcode == 2, process.exitcode
    raise RuntimeError("Engine core initialization failed. See root cause above.")

if __name__ == "__main__":
    serve()
"""


def run_server(directory: Path, text: str) -> subprocess.CompletedProcess[str]:
    """A script as a run of its own."""
    script = directory / "server.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != RUN_VARIABLE},
    )


def test_an_engine_that_refuses_ends_the_server_with_its_line(tmp_path: Path) -> None:
    """Exit code 2 and the engine's reason, without a traceback of either process."""
    done = run_server(tmp_path, CORE)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "shaper: error: no schedule can keep it"


def test_an_error_that_is_no_refusal_is_shown_as_it_is(tmp_path: Path) -> None:
    """A traceback, and exit code 1."""
    done = run_server(tmp_path, CORE.replace("process.start()", "raise ValueError('another')"))
    assert done.returncode == 1
    assert "ValueError: another" in done.stderr


def test_a_refusal_in_a_process_of_somebody_else_is_an_error_there() -> None:
    """An engine that is made in a user's own process does not end it."""
    try:
        refusal.refuse(EngineError("why"))
        assert refusal.refused(run_id()) == "why"
    finally:
        refusal_path(run_id()).unlink()
    assert refusal.refused(run_id()) is None
