"""Engines of one host that share a power budget."""

from shaper.group.cleanup import cleanup_groups
from shaper.group.host import HostGroup, join_group
from shaper.group.joining import check_group
from shaper.group.ledger import GroupLedger, memory_groups
from shaper.group.presence import apart
from shaper.group.status import GroupSnapshot, MemberStatus

__all__ = [
    "GroupLedger",
    "GroupSnapshot",
    "HostGroup",
    "MemberStatus",
    "apart",
    "check_group",
    "cleanup_groups",
    "join_group",
    "memory_groups",
]
