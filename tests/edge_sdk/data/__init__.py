"""Tests of edge_sdk/data."""
