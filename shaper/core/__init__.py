"""The control law: no I/O, no clock, no threads."""
