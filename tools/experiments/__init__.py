"""Grids of emulated runs: resumable, with tables and figures."""
