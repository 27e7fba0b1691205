"""What is known of an engine beside its steps: health, heat, admission."""
