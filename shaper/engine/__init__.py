"""The only room that knows vLLM's scheduler."""
