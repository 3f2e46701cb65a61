"""Training: step, optimizer, checkpoints, host loop, metrics and report. Knows no model."""
