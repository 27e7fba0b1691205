"""Engines of one host that share a power budget."""

from shaper.fleet.ledger import GroupLedger, memory_groups

__all__ = ["GroupLedger", "memory_groups"]


class HostGroup(GroupLedger):
    """Placeholder until the host's ledger is in."""


class GroupSnapshot:
    """Placeholder until the host's ledger is in."""


def join_group(*args: object, **kwargs: object) -> HostGroup:
    """Placeholder until the host's ledger is in."""
    raise NotImplementedError
