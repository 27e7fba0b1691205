"""Seconds and joules of a step, from a model's dimensions and a GPU's profile."""
