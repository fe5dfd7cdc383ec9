"""Tests of edge_sdk/training."""
