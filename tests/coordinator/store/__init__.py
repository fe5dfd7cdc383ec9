"""Tests of coordinator/store."""
