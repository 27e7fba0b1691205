"""A status block of a test's own, and what a scrape of it shows."""

from __future__ import annotations

import os
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shaper.core.budget import Source
from shaper.core.types import PowerBudget, PowerLimit
from shaper.ipc.control_file import EngineControl
from shaper.ipc.engine_record import EngineRecord, packed, read_statuses
from shaper.ipc.status_block import StatusWriter
from shaper.server.metrics import StatusCollector


@pytest.fixture
def run(request):
    """A run id of this test's own."""
    return f"test{os.getpid()}x{abs(hash(request.node.name)) % 10**8}"


def write(writer: StatusWriter, **parts: Any) -> None:
    """Write a record of these parts and nothing else."""
    writer.write(packed(EngineRecord(**parts)))


def scrape_text(run: str) -> str:
    registry = CollectorRegistry()
    registry.register(StatusCollector(lambda: read_statuses(run)))
    return str(generate_latest(registry).decode())


def scrape(run: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = scrape_text(run)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def control(watts: float, **values) -> EngineControl:
    fields = {
        "budget": PowerBudget((PowerLimit(watts, 0.1),)),
        "mode": "on",
        "source": Source.CONFIGURED,
        "seen_sequence": 0,
        "taken_sequence": 0,
        "refused": 0,
        "next_change_seconds": float("inf"),
    }
    return EngineControl(**(fields | values))  # type: ignore[arg-type]
