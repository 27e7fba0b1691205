"""How busy this machine was: CPU seconds of process groups and the load average.

Linux only (`/proc`); elsewhere there is no figure, and the report says so.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MachineUse:
    """Shares of this machine's CPUs during a run; 1 is all of them busy."""

    cpus: int
    busy_share: float
    server_share: float
    client_share: float
    load_average: float
    """Mean number of runnable tasks over the last minute, at the run's end."""


@dataclass(frozen=True, slots=True)
class MachineProbe:
    """CPU seconds spent so far; two of them make a `MachineUse`."""

    at_seconds: float
    busy_cpu_seconds: float
    server_cpu_seconds: float


def probe(*process_groups: int) -> MachineProbe | None:
    """CPU seconds until now of the machine and of process groups; None without `/proc`."""
    try:
        busy = _busy_cpu_seconds()
    except (OSError, ValueError, IndexError):
        return None
    servers = sum(map(group_cpu_seconds, process_groups))
    return MachineProbe(time.monotonic(), busy, servers)


def use_between(
    before: MachineProbe | None, after: MachineProbe | None, client_cpu_seconds: float
) -> MachineUse | None:
    """How busy the machine was between two probes; None where there is none."""
    if before is None or after is None or after.at_seconds <= before.at_seconds:
        return None
    cpus = os.cpu_count() or 1
    seconds = (after.at_seconds - before.at_seconds) * cpus
    return MachineUse(
        cpus=cpus,
        busy_share=(after.busy_cpu_seconds - before.busy_cpu_seconds) / seconds,
        server_share=(after.server_cpu_seconds - before.server_cpu_seconds) / seconds,
        client_share=client_cpu_seconds / seconds,
        load_average=os.getloadavg()[0],
    )


def group_cpu_seconds(process_group: int) -> float:
    """CPU seconds of the processes of a group that are still there."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        fields = _stat_fields(entry)
        if fields is not None and int(fields[2]) == process_group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def group_members(process_group: int) -> list[int]:
    """Processes of a group that have not ended; empty without `/proc`."""
    members = []
    try:
        entries = list(Path("/proc").iterdir())
    except OSError:
        return []
    for entry in entries:
        if not entry.name.isdigit():
            continue
        fields = _stat_fields(entry)
        if fields is not None and int(fields[2]) == process_group and fields[0] != "Z":
            members.append(int(entry.name))
    return members


def _stat_fields(entry: Path) -> list[str] | None:
    """Fields of `/proc/PID/stat` from the state on (proc(5)); None if it ended."""
    try:
        text = (entry / "stat").read_text()
    except OSError:
        return None
    # The command's name stands in brackets and may hold spaces and brackets.
    return text.rpartition(")")[2].split()


def _busy_cpu_seconds() -> float:
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, *_ = (int(field) for field in first)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def describe() -> str:
    """One line on this machine: CPUs, architecture, system, Python."""
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), {platform.system()}, "
        f"Python {platform.python_version()}"
    )
