"""What is learned of one engine's steps: their seconds, and the joules of their kinds."""
