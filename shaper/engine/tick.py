"""One tick of an engine beside its steps: what is controlled first, then what is shown.

    control       budget and mode as they hold now
    group         the heartbeat in the power group
    standing      health, heat and admission, with the limits that follow   (`telemetry.py`)
    shown         windows, status block, decision log, recording

Each part fails alone, is counted, and is said once (`shaper/gpu/parts.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from shaper.engine.control import BudgetControl
from shaper.engine.membership import Membership
from shaper.engine.recorder import Recorder
from shaper.engine.runtime import LiveShaper
from shaper.engine.telemetry import Telemetry
from shaper.gpu.parts import Parts
from shaper.gpu.sampler import NO_REPORT, Sampler


class EngineTick:
    """The sampler's `on_tick`.

    Args:
        parts: counts what fails.
        control: budget and mode.
        telemetry: judges, and writes the status block.
        recorder: follows orders to record.
        member: of a power group; None where there is none.

    `shaper` and `sampler` are made later than this, and set before the first tick.
    """

    shaper: LiveShaper
    sampler: Sampler

    def __init__(
        self,
        parts: Parts,
        control: BudgetControl,
        telemetry: Telemetry,
        recorder: Recorder,
        member: Membership | None,
    ) -> None:
        self._parts, self._control, self._telemetry = parts, control, telemetry
        self._recorder, self._member = recorder, member

    def __call__(self, now_seconds: float) -> None:
        """Do everything once."""
        run, sampler = self._parts.run, self.sampler
        run("control", self._control.tick, now_seconds)
        # Each time: what `state` says holds, also where the change could not be logged.
        self.shaper.set_budget(self._control.state.budget)
        self.shaper.set_mode(self._control.state.mode)
        if self._member is not None:
            run("group", self._beat, self._member)
        report = run("sensor_report", sampler.report, now_seconds)
        run(
            "tick",
            self._telemetry.tick,
            now_seconds,
            sampler.latest,
            sampler.read_errors,
            sampler.rejected_readings,
            report or NO_REPORT,
        )
        run("recording", lambda: self._recorder.follow(self._control.record_order, now_seconds))
        for section, values in self._sections():
            self._telemetry.write(section, values)

    def _beat(self, member: Membership) -> None:
        if member.tick(self._control.state.mode, decides=self.shaper.demand is not None):
            self.shaper.renew_cap()

    def _sections(self) -> list[tuple[str, Callable[[], list[float]]]]:
        sections: list[tuple[str, Callable[[], list[float]]]] = [
            ("recording", lambda: self._recorder.state.values()),
            ("control", lambda: self._control.state.values()),
        ]
        if self._member is not None:
            sections.append(("group", self._member.values))
        return sections
