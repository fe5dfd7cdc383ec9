"""Tests of edge_sdk/capacity."""
