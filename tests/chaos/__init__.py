"""Faults in real processes over a bad network: `make test-chaos`, not part of `make test`."""
