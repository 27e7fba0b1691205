"""Engines of one host that share a power budget."""

from shaper.fleet.host import HostGroup, join_group
from shaper.fleet.joining import check_group
from shaper.fleet.ledger import GroupLedger, memory_groups
from shaper.fleet.presence import apart
from shaper.fleet.standing import EngineStanding, GroupSnapshot
from shaper.fleet.sweep import sweep_groups

__all__ = [
    "EngineStanding",
    "GroupLedger",
    "GroupSnapshot",
    "HostGroup",
    "apart",
    "check_group",
    "join_group",
    "memory_groups",
    "sweep_groups",
]
