"""Shows which phase a comparison is in and how long it will still take.

A bar where stdout is a terminal; elsewhere one plain line per phase.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the work and how long it is expected to take."""

    name: str
    expected_seconds: float


class _LeftColumn(ProgressColumn):
    """Time left: expected in all, less what is done. The bar's unit is seconds."""

    def render(self, task: Task) -> Text:
        left = max(0.0, (task.total or 0.0) - task.completed)
        return Text(f"about {clock(left)} left", style="cyan")


def clock(seconds: float) -> str:
    """Minutes and seconds as `m:ss`."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


class PhaseProgress:
    """Goes through phases in order; used as a context manager."""

    def __init__(self, phases: Sequence[Phase], console: Console | None = None) -> None:
        """Nothing is drawn before the `with` block is entered."""
        self._phases = list(phases)
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._current = -1
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            # Drawn seldom, since the server under test shares the CPUs.
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                _LeftColumn(),
                console=self._console,
                refresh_per_second=2,
                expand=True,
            )
            self._task = self._bar.add_task("starting", total=self._total)

    @property
    def _total(self) -> float:
        return sum(phase.expected_seconds for phase in self._phases)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            if error is None:
                self._bar.update(self._task, completed=self._total, description="done")
            self._bar.stop()

    def next(self) -> None:
        """The next phase begins."""
        self._current += 1
        self._begin = time.monotonic()
        phase = self._phases[self._current]
        if self._bar is None:
            left = sum(later.expected_seconds for later in self._phases[self._current :])
            place = f"[{self._current + 1}/{len(self._phases)}]"
            self._console.print(f"{place} {phase.name} (about {clock(left)} left)", markup=False)
        else:
            self.update()

    def update(self, detail: str = "") -> None:
        """Draw how far the phase is.

        Args:
            detail: what to add to the phase's name, such as counts.
        """
        if self._bar is None or self._current < 0:
            return
        phase = self._phases[self._current]
        within = min(time.monotonic() - self._begin, phase.expected_seconds)
        before = sum(earlier.expected_seconds for earlier in self._phases[: self._current])
        place = f"{self._current + 1}/{len(self._phases)}"
        name = f"{phase.name}: {detail}" if detail else phase.name
        self._bar.update(self._task, completed=before + within, description=f"{place} {name}")

    def say(self, text: str) -> None:
        """A line that stays above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)
