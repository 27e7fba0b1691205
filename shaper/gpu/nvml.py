"""The real GPU: readings from NVIDIA's driver through `nvidia-ml-py`.

It reads; it never sets a clock, a limit or a mode, so it needs no root.

A driver that is unloaded, or a GPU that falls off the bus, is let go and opened again: at
first after a second, then after twice the time before, half a minute at most. The GPUs are
found again by their UUIDs, and keep the index that they had.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from shaper.core.types import GpuIdentity, GpuSample
from shaper.errors import GpuError, GpuLostError, GpuUnavailableError
from shaper.gpu.capabilities import GpuCapabilities, HostGpu
from shaper.gpu.nvml_device import Device
from shaper.gpu.nvml_driver import Driver
from shaper.gpu.nvml_errors import Behaviour, behaviour
from shaper.gpu.read_methods import MODULE_SCOPE, mig_mode, optional
from shaper.gpu.visible import refuse_slice, refuse_twice, visible_gpus

__all__ = ["NvmlReader", "host_gpus", "visible_gpus"]

_log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0
"""A driver is reloaded in some seconds; one that stays away is not worth a core."""


class NvmlReader:
    """A `GpuReader` over the driver.

    Args:
        selectors: indices in the driver's order, or UUIDs or unique beginnings of
            them, as `visible_gpus` returns.
        clock: seconds of the monotonic clock; stamps the samples.
        library: what stands in for `pynvml`; None: the real one.

    Raises:
        GpuUnavailableError: no driver, no such GPU, one that is named twice, or one in MIG mode.
        GpuPermissionError: the driver refuses this user.
    """

    def __init__(
        self,
        selectors: Sequence[int | str],
        clock: Callable[[], float] = time.monotonic,
        library: Any = None,
    ) -> None:
        self._clock = clock
        self._driver = Driver(library)
        self._closed = False
        self._holds = False
        self._devices: list[Device] = []
        self._due_seconds = self._retry_seconds = 0.0
        self._why = ""
        self.reconnects = 0
        """Times that a lost driver or GPU was found again."""
        self._open(selectors, None)
        self._gpus = tuple(device.identity for device in self._devices)
        for device in self._devices:
            if device.power_scope == MODULE_SCOPE:
                _log.warning(
                    "GPU %d (%s): its power is metered with its CPU's, as one module",
                    device.identity.index,
                    device.identity.name,
                )

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        """The GPUs, in the order of the selectors."""
        return self._gpus

    @property
    def doing(self) -> str:
        """The driver's call that is under way, and on which GPU; empty between calls."""
        return self._driver.doing

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU, each stamped just before it was read.

        Raises:
            GpuError: the driver refused, a GPU is gone, or the reader is closed.
        """
        if self._closed:
            raise GpuUnavailableError("this reader is closed")
        if not self._devices:
            self._reopen()
        try:
            samples = tuple(device.sample(self._clock()) for device in self._devices)
        except GpuError as error:
            if behaviour(error) is Behaviour.RECONNECT:
                self._lose(error)
            raise
        self._retry_seconds = 0.0
        return samples

    def capabilities(self) -> tuple[GpuCapabilities, ...]:
        """What each GPU can be asked. Reads once, so that what is missing has said so.

        Raises:
            GpuError: as `read` does.
        """
        self.read()
        version = optional(lambda: self._driver.call("nvmlSystemGetDriverVersion"))
        return tuple(device.capabilities(str(version or "")) for device in self._devices)

    def close(self) -> None:
        """Let go of the driver. May be called twice."""
        self._closed = True
        self._let_go()

    def _open(self, selectors: Sequence[int | str], indices: Sequence[int] | None) -> None:
        self._driver.call("nvmlInit")
        self._holds = True
        try:
            handles = [_find(self._driver, selector) for selector in selectors]
            self._devices = [
                Device(self._driver, handle, None if indices is None else indices[position])
                for position, handle in enumerate(handles)
            ]
            found = [device.identity for device in self._devices]
            refuse_twice(selectors, {gpu.index: gpu.uuid for gpu in found})
        except GpuError:
            self._let_go()
            raise

    def _lose(self, error: GpuError) -> None:
        """Let go, and say when to try again."""
        self._let_go()
        doubled = 2.0 * self._retry_seconds or FIRST_RETRY_SECONDS
        self._retry_seconds = min(doubled, LAST_RETRY_SECONDS)
        self._due_seconds = self._clock() + self._retry_seconds
        self._why = str(error)

    def _reopen(self) -> None:
        if self._clock() < self._due_seconds:
            raise GpuLostError(f"{self._why}; it is tried again every {self._retry_seconds:g} s")
        try:
            self._open([gpu.uuid for gpu in self._gpus], [gpu.index for gpu in self._gpus])
        except GpuError as error:
            self._lose(error)
            raise
        self.reconnects += 1

    def _let_go(self) -> None:
        self._devices = []
        if self._holds:
            self._holds = False
            # A driver that is gone has nothing left to let go of.
            with contextlib.suppress(GpuError):
                self._driver.call("nvmlShutdown")


def host_gpus(library: Any = None) -> tuple[HostGpu, ...]:
    """All GPUs that the driver shows, in its order.

    Raises:
        GpuError: there is no driver, or it refuses this user.
    """
    driver = Driver(library)
    driver.call("nvmlInit")
    try:
        found = []
        for index, uuid, handle in _shown(driver)[0]:
            name = str(driver.call("nvmlDeviceGetName", handle))
            found.append(HostGpu(index, name, uuid, mig_mode(driver, handle, "the NVIDIA driver")))
        return tuple(found)
    finally:
        driver.call("nvmlShutdown")


def _shown(driver: Driver) -> tuple[list[tuple[int, str, Any]], list[str]]:
    """Index, UUID and handle of each GPU that answers, and what the others say.

    Another engine's GPU that fell off the bus, or is not ours to ask, must not cost this one.
    """
    found, silent = [], []
    for index in range(int(driver.call("nvmlDeviceGetCount"))):
        try:
            handle = driver.call("nvmlDeviceGetHandleByIndex", index, subject=f"GPU {index}")
            uuid = str(driver.call("nvmlDeviceGetUUID", handle, subject=f"GPU {index}"))
        except GpuError as error:
            silent.append(str(error))
        else:
            found.append((index, uuid, handle))
    return found, silent


def _find(driver: Driver, selector: int | str) -> Any:
    """The handle of one GPU.

    Raises:
        GpuUnavailableError: there is no such GPU, or more than one.
    """
    if isinstance(selector, int):
        count = int(driver.call("nvmlDeviceGetCount"))
        if selector >= count:
            raise GpuUnavailableError(f"there is no GPU {selector}; the driver shows {count}")
        return driver.call("nvmlDeviceGetHandleByIndex", selector)
    refuse_slice(selector, "this engine is given")
    shown, silent = _shown(driver)
    matches = [handle for _, uuid, handle in shown if uuid.lower().startswith(selector.lower())]
    if len(matches) != 1:
        known = ", ".join([*(uuid for _, uuid, _ in shown), *silent]) or "none"
        what = "more than one GPU" if matches else "no GPU"
        raise GpuUnavailableError(f"{selector!r} is the beginning of {what}'s UUID; known: {known}")
    return matches[0]
