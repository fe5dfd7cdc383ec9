"""The trainer, the process that the agent starts: one job at a time on local data."""
