"""Energy over time, and what each limit leaves for a step."""
