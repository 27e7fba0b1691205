"""Log where vLLM logs."""

from __future__ import annotations

import logging


def share_log_handlers() -> None:
    """Give our loggers vLLM's format and level, unless the user set them up.

    vLLM sets its own up before its plug-ins in an engine, after them in an API server: this
    is called wherever we enter a process, and does something the first time that it can.
    """
    ours, theirs = logging.getLogger("shaper"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
