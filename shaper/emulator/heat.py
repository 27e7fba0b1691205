"""The temperature of one emulated GPU: two stages, die to heat sink to ambient.

    C_die  dT_die/dt  = watts - (T_die - T_sink) / R_die
    C_sink dT_sink/dt = (T_die - T_sink) / R_die - (T_sink - ambient) / R_sink

Each stage is stepped with its own exponential, the die first, in sub-steps that are
short beside the sink's time constant.
"""

from __future__ import annotations

from math import ceil, exp

from shaper.core.model.profile import HeatSpec


class HeatModel:
    """Die and sink temperatures; `step` moves them through time."""

    __slots__ = ("_spec", "_substep_seconds", "ambient_celsius", "die_celsius", "sink_celsius")

    def __init__(self, spec: HeatSpec, watts: float, ambient_celsius: float | None = None) -> None:
        """Starts in the steady state of `watts`."""
        self._spec = spec
        self.ambient_celsius = spec.ambient_celsius if ambient_celsius is None else ambient_celsius
        self.sink_celsius = self.ambient_celsius + watts * spec.sink_kelvin_per_watt
        self.die_celsius = self.sink_celsius + watts * spec.die_kelvin_per_watt
        sink_tau = spec.sink_kelvin_per_watt * spec.sink_joules_per_kelvin
        self._substep_seconds = max(sink_tau / 20.0, 1e-3)

    def steady_celsius(self, watts: float) -> float:
        """Where the die ends up if `watts` lasts."""
        spec = self._spec
        return self.ambient_celsius + watts * (spec.die_kelvin_per_watt + spec.sink_kelvin_per_watt)

    def step(self, seconds: float, watts: float) -> None:
        """Lets `watts` act for `seconds`."""
        if seconds <= 0:
            return
        spec = self._spec
        count = min(ceil(seconds / self._substep_seconds), 400)
        part = seconds / count
        die_tau = spec.die_kelvin_per_watt * spec.die_joules_per_kelvin
        sink_tau = spec.sink_kelvin_per_watt * spec.sink_joules_per_kelvin
        die_left = exp(-part / die_tau) if die_tau > 0 else 0.0
        sink_left = exp(-part / sink_tau) if sink_tau > 0 else 0.0
        for _ in range(count):
            target = self.sink_celsius + watts * spec.die_kelvin_per_watt
            before = self.die_celsius
            self.die_celsius = target + (before - target) * die_left
            stored = spec.die_joules_per_kelvin * (self.die_celsius - before)
            flow = watts - stored / part
            rest = self.ambient_celsius + flow * spec.sink_kelvin_per_watt
            self.sink_celsius = rest + (self.sink_celsius - rest) * sink_left
