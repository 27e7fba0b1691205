"""The `vllm.stat_logger_plugins` entry: shows the shaper's metrics on vLLM's `/metrics`.

vLLM makes one of these in every API server. The numbers themselves come from the
engines' records (`shaper/ipc/engine_record.py`), not through vLLM's statistics.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from vllm.v1.metrics.loggers import StatLoggerBase

from shaper.ipc.engine_record import read_statuses
from shaper.ipc.refused_requests import refused_requests
from shaper.ipc.status_block import run_id
from shaper.server.metrics import StatusCollector

_MARK = "_shaper_collector"


def register_collector(registry: CollectorRegistry) -> None:
    """Add the collector to a registry, once."""
    if not hasattr(registry, _MARK):
        run = run_id()
        registry.register(
            StatusCollector(lambda: read_statuses(run), lambda: refused_requests(run))
        )
        setattr(registry, _MARK, True)


class ShaperStatLogger(StatLoggerBase):
    """Registers the collector when vLLM makes it; records nothing itself."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        register_collector(REGISTRY)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the module."""

    def log_engine_initialized(self) -> None:
        """Nothing."""
