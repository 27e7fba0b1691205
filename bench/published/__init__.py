"""Public measurements: how they are read, and what the step model makes of them."""
