"""Tests of edge_sdk."""
