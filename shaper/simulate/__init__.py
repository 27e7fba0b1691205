"""Virtual time. Empty until it is there."""
