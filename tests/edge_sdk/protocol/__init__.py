"""Tests of edge_sdk/protocol."""
