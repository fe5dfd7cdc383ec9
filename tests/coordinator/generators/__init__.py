"""Tests of coordinator/generators."""
