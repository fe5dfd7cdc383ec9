"""Tests of edge_sdk/cli."""
