"""Engines of one host that share a power budget."""

from shaper.fleet.ledger import GroupLedger, memory_groups

__all__ = ["GroupLedger", "memory_groups"]
