"""A run's folder: database, checkpoints, journal, lock, status."""
