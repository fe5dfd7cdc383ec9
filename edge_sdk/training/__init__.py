"""The training process: one job on local data."""
