"""A child of vLLM's whose server is gone ends itself; processes of others are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shaper.ipc import processes
from shaper.ipc.processes import lives

# A server that starts an engine, and an engine of that name that watches it.
SERVER = """
import multiprocessing, os, sys, time
from shaper.ipc.orphan import watch_parent
def engine(then):
    watch_parent(lambda: open("told", "w").close())
    if then == "deaf":
        import signal
        signal.signal(signal.SIGTERM, lambda *_: None)
    open("pids.tmp", "w").write(f"{os.getppid()} {os.getpid()}")
    os.rename("pids.tmp", "pids")
    while True:
        time.sleep(0.1)
if __name__ == "__main__":
    method, name, then = sys.argv[1:]
    import shaper.ipc.orphan
    process = multiprocessing.get_context(method).Process(target=engine, name=name, args=(then,))
    process.start()
    open("server", "w").write(str(os.getpid()))
    process.join()
"""


def started(
    folder: Path, method: str, name: str, then: str = ""
) -> tuple[subprocess.Popen[bytes], int]:
    (folder / "server.py").write_text(SERVER)
    process = subprocess.Popen(
        [sys.executable, "server.py", method, name, then],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(processes.__file__).parents[2])},
    )
    deadline = time.monotonic() + 60
    while not (folder / "pids").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, int((folder / "pids").read_text().split()[1])


def ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not lives(pid)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((method, "EngineCore") for method in ("spawn", "fork", "forkserver")),
        *(("spawn", name) for name in ("EngineCore_DP1", "ApiServer_0")),
    ],
)
def test_a_child_of_a_killed_server_ends(tmp_path, method, name):
    """However `multiprocessing` started it; what is to be done before is done."""
    server, engine = started(tmp_path, method, name)
    try:
        time.sleep(1.2)
        assert lives(engine)
        server.kill()
        server.wait()
        assert ends(engine, 30)
        assert (tmp_path / "told").exists()
    finally:
        if lives(engine):
            os.kill(engine, signal.SIGKILL)


def test_one_that_does_not_end_is_killed(tmp_path):
    """An engine drains its requests first, and nobody is left to read the answers."""
    server, engine = started(tmp_path, "spawn", "EngineCore", "deaf")
    server.kill()
    server.wait()
    assert ends(engine, 60)


def test_a_process_of_the_user_s_own_is_not_watched(tmp_path):
    """An engine inside a child of somebody else's program may outlive its parent."""
    server, process = started(tmp_path, "spawn", "my-worker")
    server.kill()
    server.wait()
    assert not ends(process, 2.0)
    os.kill(process, signal.SIGKILL)
