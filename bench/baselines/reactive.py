"""A reactive loop on concurrency: measured power in, a cap on requests out, every half second.

Law, additive increase and multiplicative decrease (AIMD). Every `interval_seconds`,
with the mean power metered since the last time:

- above the lowest limit: the cap becomes `decrease_ratio` of what ran, at least 1;
- below `raise_below_ratio` of it, and requests waited for the cap in between:
  the cap rises by `increase_requests`. Where demand was below the cap, the cap was not
  what kept power low, and stays;
- else, or without a new reading: the cap stays.

The cap holds admissions (`running_requests`) and, where more run than it allows, the
decodes of a step (`decode_requests`), which take turns. There is no prediction: half a
second is some 50 steps, and what happens in between is seen when it is over. This is
the feedback loop of systems that steer an unmodified engine by its meter (PALS, 2026).
"""

from __future__ import annotations

import math

from shaper.core.policy import Plan, PlanInput
from shaper.core.types import UNLIMITED, PowerState, Reason, StepLimits
from shaper.errors import ConfigError


class ReactiveConcurrency:
    """The policy above.

    Stateful fields: the cap, the last reading used, and the demand since then.

    The target is the budget's lowest limit, as it stands; without any the cap never moves.

    Args:
        interval_seconds: of the loop.
        decrease_ratio: within (0, 1).
        increase_requests: at least 1.
        raise_below_ratio: within (0, 1].

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        interval_seconds: float = 0.5,
        decrease_ratio: float = 0.75,
        increase_requests: int = 2,
        raise_below_ratio: float = 0.95,
    ) -> None:
        sound = (
            interval_seconds > 0
            and 0 < decrease_ratio < 1
            and increase_requests >= 1
            and 0 < raise_below_ratio <= 1
        )
        if not sound:
            raise ConfigError(
                f"a reactive loop can't run every {interval_seconds:g} s, times "
                f"{decrease_ratio:g}, plus {increase_requests}, below {raise_below_ratio:g}"
            )
        self._interval_seconds = interval_seconds
        self._decrease_ratio = decrease_ratio
        self._increase_requests = increase_requests
        self._raise_below_ratio = raise_below_ratio
        self._cap: int | None = None
        self._before: PowerState | None = None
        self._most_wanted = 0

    @property
    def cap(self) -> int | None:
        """Requests that may run at once; None until the limit was first exceeded."""
        return self._cap

    def plan(self, view: PlanInput) -> Plan:
        """The cap, where it binds."""
        load = view.load
        wanted = load.running_requests + load.waiting_requests
        self._most_wanted = max(self._most_wanted, wanted)
        if view.state is not None:
            self._react(view.state, view.headroom.sustained_watts)
        if not wanted:
            return Plan(UNLIMITED, Reason.IDLE)
        cap = self._cap
        if cap is None or wanted <= cap:
            return Plan(UNLIMITED, Reason.UNCONSTRAINED)
        decodes = cap if load.decode_requests > cap else None
        return Plan(StepLimits(decode_requests=decodes, running_requests=cap), Reason.CAP)

    def _react(self, state: PowerState, limit_watts: float) -> None:
        before = self._before
        if before is None:
            self._before = state
            return
        if state.sampled_seconds - before.sampled_seconds < self._interval_seconds:
            return
        watts = _mean_watts(before, state)
        if watts is not None:
            self._cap = self._next_cap(watts, limit_watts)
        self._before, self._most_wanted = state, 0

    def _next_cap(self, watts: float, limit_watts: float) -> int | None:
        cap = self._cap
        if watts > limit_watts:
            ran = self._most_wanted if cap is None else min(cap, self._most_wanted)
            return max(1, math.floor(ran * self._decrease_ratio))
        raises = watts < self._raise_below_ratio * limit_watts
        if cap is not None and raises and self._most_wanted > cap:
            return cap + self._increase_requests
        return cap


def _mean_watts(before: PowerState, now: PowerState) -> float | None:
    """From the energy counter, unless it is missing or went back; then the meter's own mean."""
    if before.energy_joules is not None and now.energy_joules is not None:
        joules = now.energy_joules - before.energy_joules
        if joules >= 0:
            return joules / (now.sampled_seconds - before.sampled_seconds)
    return now.average_watts if now.average_watts is not None else now.instant_watts
