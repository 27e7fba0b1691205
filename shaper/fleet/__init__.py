"""Engines that share a budget. Empty until they do."""
