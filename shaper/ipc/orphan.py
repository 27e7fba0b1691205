"""A process of vLLM's whose server is gone ends itself.

A server that is killed can't end its engines: they would serve nobody, and keep their memory
and their place in a power group, so that the server could not be started again. vLLM's engine
cores and the further API servers are `multiprocessing` children; what started one is gone when
the pipe that ties them is closed, or when the kernel gave it another parent. A process that
vLLM did not start as one of these (an engine inside the user's own process, an actor of Ray's)
is not watched: who its parent is means nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from shaper.errors import EngineError

logger = logging.getLogger(__name__)

# As vLLM names them, with the rank or the number behind.
_NAMES = ("EngineCore", "ApiServer")
_LOOK_SECONDS = 0.5
END_SECONDS = 5.0
"""For an orphan to end in order, with what it writes."""
_watched = False


class Parent:
    """Who started this process.

    Args:
        process: `multiprocessing`'s handle of it.
    """

    def __init__(self, process: Any) -> None:
        self.pid: int = process.pid
        self._sentinel = process.sentinel
        # With `forkserver` the kernel's parent is not who started it.
        self._kernel_pid = os.getppid()

    def gone(self, wait_seconds: float = 0.0) -> bool:
        """Whether it has ended; waits so long for that at the most."""
        ended = bool(wait([self._sentinel], wait_seconds))
        return ended or os.getppid() != self._kernel_pid or not _exists(self.pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def own_parent() -> Parent | None:
    """Of this process, if it is one of vLLM's that must not outlive it."""
    process = multiprocessing.parent_process()
    if process is None or not multiprocessing.current_process().name.startswith(_NAMES):
        return None
    return Parent(process)


def watch_parent(before_end: Callable[[], None] = lambda: None) -> None:
    """End this process when its server is gone. Once for a process; others are left alone.

    Args:
        before_end: called then, e.g. so that no request is finished for nobody.

    Raises:
        EngineError: it is gone already.
    """
    global _watched
    parent = own_parent()
    if parent is None or _watched:
        return
    if parent.gone():
        raise EngineError(f"the server of this engine (process {parent.pid}) is gone: it ends")
    _watched = True
    threading.Thread(
        target=_watch, args=(parent, before_end), name="shaper-parent", daemon=True
    ).start()


def _watch(parent: Parent, before_end: Callable[[], None]) -> None:
    while not parent.gone(_LOOK_SECONDS):
        pass
    logger.error("process %d, which started this one, is gone: it ends itself", parent.pid)
    try:
        before_end()
    except Exception:
        logger.exception("what was to be done before the end failed")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
