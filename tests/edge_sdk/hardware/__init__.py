"""Tests of edge_sdk/hardware."""
