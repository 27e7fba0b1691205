"""Members of a group in a test's own directory, and how they join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shaper.core.types import PowerLimit
from shaper.group import HostGroup, join_group

LIMITS = (PowerLimit(1000.0, 0.1), PowerLimit(900.0, 5.0))


def join(folder: Path, label: str = "one", name: str = "g", **changed: Any) -> HostGroup:
    given = {"limits": LIMITS, "idle_watts": 100.0, "rest_watts": 80.0, **changed}
    limits = given.pop("limits")
    return join_group(name, limits, rest_after_seconds=1.0, label=label, directory=folder, **given)
