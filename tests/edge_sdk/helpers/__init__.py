"""Tests of edge_sdk/helpers."""
