"""What the processes of one host share: status blocks, the control file, their metrics."""
