"""Tests of coordinator/runs."""
