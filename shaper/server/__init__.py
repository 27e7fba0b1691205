"""Inside vLLM's API server: control routes, admission, drain, metrics."""
