"""Tests of edge_sdk/infer."""
