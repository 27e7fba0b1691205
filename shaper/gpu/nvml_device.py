"""One GPU as the driver shows it: one batch of fields, and getters for the rest.

Law. A quantity is an ordered list of ways to read it (`read_methods.py`). Each tick asks for
all quantities whose first way is a field in one call. A way that this GPU or driver does
not support, or refuses, is struck out the first time it says so, and the next one is tried
at once; a quantity with no way left is None from then on. A reading that failed this time
is None this time. A GPU or driver that is gone raises.
"""

from __future__ import annotations

from typing import Any

from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample
from shaper.errors import GpuError, GpuLostError, GpuPermissionError, GpuUnavailableError
from shaper.gpu.capabilities import (
    INTEGRATED,
    NOT_SUPPORTED,
    QUANTITIES,
    GpuCapabilities,
    Source,
)
from shaper.gpu.nvml_driver import Driver
from shaper.gpu.nvml_errors import Behaviour, behaviour
from shaper.gpu.read_methods import (
    HEAT_PARTS,
    ReadMethods,
    Way,
    limit_range,
    max_sm_clock_hertz,
    meters_instant,
    mig_mode,
    optional,
    power_scopes,
)

_SLOW_PERIOD_SECONDS = 1.0
_POWER = ("instant_watts", "average_watts")
# A margin beyond this is no reading of a GPU that works.
_MAX_MARGIN_CELSIUS = 120.0
# The reasons are bits of a 64 bit number, of which the low ones are in use.
_MOST_REASONS = 2.0**32


class Device:
    """One GPU: its handle and the ways that still work.

    Args:
        driver: its calls.
        handle: of this GPU.
        index: what its samples are stamped with; None: the driver's own.

    Raises:
        GpuUnavailableError: it is in MIG mode.
        GpuError: the driver refuses, or the GPU is gone.
    """

    def __init__(self, driver: Driver, handle: Any, index: int | None = None) -> None:
        self._driver, self._handle = driver, handle
        shown = int(driver.call("nvmlDeviceGetIndex", handle))
        name = str(driver.call("nvmlDeviceGetName", handle))
        self._subject = subject = f"GPU {shown} ({name})"
        self._mig = mig_mode(driver, handle, subject)
        if self._mig:
            raise GpuUnavailableError(
                f"{subject} is in MIG mode, in which its power cannot be told apart by "
                "slice; turn MIG off or use another GPU"
            )
        self.power_scope, module = power_scopes(driver, handle, subject)
        instant = meters_instant(driver, handle, name, subject)
        ways = ReadMethods(driver, self.power_scope, module, instant)
        self._ticked, self._slow = ways.ticked, ways.slow
        self._struck: dict[str, str] = {}
        self._answered: set[str] = set()
        self._failed: GpuError | None = None
        self._kept: dict[str, float] = {}
        self._slow_due_seconds = float("-inf")
        self._metered = False
        first = self._values(self._slow)
        self.identity = GpuIdentity(
            index=shown if index is None else index,
            name=name,
            uuid=str(driver.call("nvmlDeviceGetUUID", handle, subject=subject)),
            enforced_limit_watts=first.get("enforced_limit_watts"),
            max_sm_clock_hertz=max_sm_clock_hertz(driver, handle, subject),
            slowdown_celsius=self._slowdown_celsius(first),
        )

    def sample(self, now_seconds: float) -> GpuSample:
        """One reading, stamped with `now_seconds`.

        Raises:
            GpuError: the GPU is gone, or nothing could be read of its power.
        """
        self._failed = None
        if now_seconds >= self._slow_due_seconds:
            self._kept = self._values(self._slow)
            self._slow_due_seconds = now_seconds + _SLOW_PERIOD_SECONDS
        found = self._values(self._ticked)
        self._check_power(found)
        heat = [found.pop(part, None) for part in HEAT_PARTS if self._ticked[part]]
        known = [seconds for seconds in heat if seconds is not None]
        bits = found.pop("clock_event_reasons", 0.0)
        reasons = ClockEventReasons(int(bits) if 0.0 <= bits < _MOST_REASONS else 0)
        margin = self._kept.get("slowdown_margin_celsius")
        celsius, slowdown = self._kept.get("temperature_celsius"), self.identity.slowdown_celsius
        if margin is None and celsius is not None and slowdown is not None:
            margin = slowdown - celsius
        return GpuSample(
            read_seconds=now_seconds,
            gpu_index=self.identity.index,
            clock_event_reasons=reasons,
            # A part that is missing this time would let the sum go backwards.
            thermal_throttle_seconds=sum(known) if heat and len(known) == len(heat) else None,
            **found,
            **{**self._kept, "slowdown_margin_celsius": margin},
        )

    def capabilities(self, driver_version: str) -> GpuCapabilities:
        """What this GPU can be asked, as far as it has said so."""
        ways = {**self._slow, **self._ticked}
        heat = [way.label for part in HEAT_PARTS for way in ways[part][:1]]
        sources = []
        for name in QUANTITIES:
            how = " + ".join(heat) if name == "thermal_throttle_seconds" else ""
            if ways.get(name):
                how = ways[name][0].label
            elif name == "slowdown_margin_celsius" and self.identity.slowdown_celsius is not None:
                how = "slowdown temperature minus temperature"
            missing = "" if how else self._struck.get(name, NOT_SUPPORTED)
            if not how and name == "energy_joules":
                how = INTEGRATED
            sources.append(Source(name, how, missing))
        default, lowest, highest = limit_range(self._driver, self._handle, self._subject)
        powered = any(ways[name] for name in _POWER)
        return GpuCapabilities(
            gpu=self.identity,
            power_scope=self.power_scope if powered else "",
            sources=tuple(sources),
            default_limit_watts=default,
            min_limit_watts=lowest,
            max_limit_watts=highest,
            mig=self._mig,
            driver_version=driver_version,
        )

    def _values(self, table: dict[str, list[Way]]) -> dict[str, float]:
        found: dict[str, float] = {}
        failed = self._batch(table, found)
        for name, ways in table.items():
            if name in found or name in failed:
                continue
            value = self._first(name, ways)
            if value is not None:
                found[name] = value
        self._answered.update(found)
        return found

    def _batch(self, table: dict[str, list[Way]], found: dict[str, float]) -> set[str]:
        """Ask for all fields in one call; returns what failed this time."""
        wanted = [
            (name, ways[0].field, ways[0].scale)
            for name, ways in table.items()
            if ways and ways[0].field is not None
        ]
        if not wanted:
            return set()
        pairs = [field for _, field, _ in wanted]
        failed: set[str] = set()
        try:
            answers = self._driver.fields(self._handle, pairs, self._subject)
        except GpuError as error:
            if behaviour(error) is Behaviour.RECONNECT:
                raise
            self._failed = error
            return {name for name, _, _ in wanted}
        for (name, _, scale), answer in zip(wanted, answers, strict=True):
            if answer.error is None:
                found[name] = answer.value * scale
            elif not self._mark_unsupported(name, table[name], answer.error):
                failed.add(name)
        return failed

    def _first(self, name: str, ways: list[Way]) -> float | None:
        """The first getter that this GPU supports; strikes out those before it."""
        while ways and ways[0].getter:
            way = ways[0]
            try:
                found = self._driver.call(
                    way.getter, self._handle, *way.arguments, subject=self._subject
                )
                return float(found) * way.scale
            except GpuError as error:
                if not self._mark_unsupported(name, ways, error):
                    return None
        return None

    def _mark_unsupported(self, name: str, ways: list[Way], error: GpuError) -> bool:
        """Whether the way that led to this error is struck out; False: it failed this time."""
        what = behaviour(error)
        if what is Behaviour.RECONNECT:
            raise error
        if what is Behaviour.RETRY:
            self._failed = error
            return False
        if len(ways) == 1 and name in self._answered:
            return False  # it was there before, and has no other way
        ways.pop(0)
        self._struck[name] = (
            "no permission" if isinstance(error, GpuPermissionError) else NOT_SUPPORTED
        )
        return True

    def _check_power(self, found: dict[str, float]) -> None:
        """A GPU whose power could be read and can't be now is a failed read, or a lost GPU."""
        if any(name in found for name in _POWER):
            self._metered = True
            return
        if self._failed is not None:
            raise self._failed
        if self._metered:
            raise GpuLostError(f"{self._subject}: no way to read its power is left")

    def _slowdown_celsius(self, first: dict[str, float]) -> float | None:
        """Where software lowers the clocks; the hardware's own slowdown comes some degrees
        later. Newer GPUs tell their distance from it instead."""
        threshold = self._driver.number("NVML_TEMPERATURE_THRESHOLD_GPU_MAX")
        function = "nvmlDeviceGetTemperatureThreshold"
        found = optional(
            lambda: self._driver.call(function, self._handle, threshold, subject=self._subject)
        )
        if found is not None:
            return float(found)
        celsius = first.get("temperature_celsius")
        margin = first.get("slowdown_margin_celsius")
        if celsius is None or margin is None or not 0.0 < margin < _MAX_MARGIN_CELSIUS:
            return None
        return celsius + margin
