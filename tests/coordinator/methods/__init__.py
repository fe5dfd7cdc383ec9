"""Tests of coordinator/methods."""
