"""Real devices: sessions, jobs, transfers, the spool."""
