"""What is sent to engines, recorded or drawn, and the figures of power and latency."""
