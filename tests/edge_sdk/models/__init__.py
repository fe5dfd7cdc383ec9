"""Tests of edge_sdk/models."""
