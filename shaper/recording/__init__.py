"""Recordings of steps and meter samples: one format, one reader, one writer."""
