"""What is learned of a GPU: step seconds, when its energy counter moves, and joules."""
