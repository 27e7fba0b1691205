"""Shaper: a power-aware batching shaper for vLLM.

`shaper.PowerScheduler` is what `vllm serve --scheduler-cls` may name. It is
resolved on first use, so that importing this package needs no vLLM.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["PowerScheduler", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "PowerScheduler":
        from shaper.engine.scheduler import power_scheduler

        return power_scheduler
    raise AttributeError(f"module 'shaper' has no attribute {name!r}")
