"""Engines that follow a control file, without vLLM: what the tests of the control plane share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from shaper.core.budget import BudgetPlan, BudgetTerms
from shaper.core.types import PowerLimit
from shaper.engine.control import BudgetControl
from shaper.ipc.control_file import ChangeRecord, ControlFile, ControlRecord, Follower, Origin
from shaper.ipc.status_block import control_paths

ORIGIN = Origin(sequence=1, who="a", why="", at="")
CONFIGURED = BudgetTerms((PowerLimit(560.0, 1.0),))


@pytest.fixture
def run() -> Iterator[str]:
    name = f"test{uuid.uuid4().hex[:12]}"
    yield name
    for path in control_paths(name):
        for found in path.parent.glob(f"{path.name}*"):
            found.rmdir() if found.is_dir() else found.unlink()


def record(run: str, sequence: int, watts: float = 400.0, **change: Any) -> ControlRecord:
    terms = BudgetTerms((PowerLimit(watts, 1.0),))
    origin = ORIGIN.model_copy(update={"sequence": sequence})
    budget = ChangeRecord(terms=terms, **change)
    return ControlRecord(run=run, sequence=sequence, budget=budget, origins={"budget": origin})


class Walls:
    """A wall clock that a test sets."""

    seconds = 1.8e9

    def __call__(self) -> float:
        return self.seconds


def engine(run: str, wall: Walls | None = None, **changes: Any) -> BudgetControl:
    options = {"gpu_count": 1, "idle_watts": 115.0, "now_seconds": 0.0} | changes
    plan = BudgetPlan(CONFIGURED)
    return BudgetControl(plan, "on", Follower(ControlFile(run)), wall=wall or Walls(), **options)


def watts(control: BudgetControl) -> float:
    return control.state.budget.limits[0].watts
