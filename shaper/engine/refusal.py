"""A start that an engine refuses after vLLM has begun it: one line, and exit code 2.

An engine core that can't keep what was asked leaves its reason in a file of its run and ends
without a traceback. vLLM's server then fails as well, with a traceback that names no cause;
`show_refusals`, called in the server's process, shows the engine's line in its place.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sys
from types import TracebackType

from shaper.errors import ShaperError
from shaper.ipc.status_block import refusal_path, run_id

logger = logging.getLogger(__name__)

EXIT_CODE = 2
# As vLLM names the processes of its engine cores.
_ENGINE_CORE = "EngineCore"


def refuse(error: ShaperError) -> None:
    """Leave the reason for whoever started this engine, and end an engine core's process.

    In any other process it returns, and the error goes to whoever made the engine.

    Raises:
        SystemExit: this process is an engine core.
    """
    line = " ".join(str(error).split())
    # A full disk costs the server its line; the log has it all the same.
    with contextlib.suppress(OSError):
        refusal_path(run_id()).write_text(line)
    logger.error("the start is refused: %s", line)
    if multiprocessing.current_process().name.startswith(_ENGINE_CORE):
        raise SystemExit(EXIT_CODE) from error


def refused(run: str) -> str | None:
    """Why an engine of this run refused to start; None where none did."""
    try:
        return refusal_path(run).read_text() or None
    except OSError:
        return None


def show_refusals() -> None:
    """From now on, what ends this process is shown as an engine's refusal, if there is one."""
    previous, run = sys.excepthook, run_id()
    if getattr(previous, "__module__", None) == __name__:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = refused(run)
        if line is None:
            previous(kind, error, trace)
            return
        print(f"shaper: error: {line}", file=sys.stderr)
        raise SystemExit(EXIT_CODE)

    sys.excepthook = hook
