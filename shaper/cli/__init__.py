"""The commands, one module each, and what `shaper serve` does before vLLM starts."""
