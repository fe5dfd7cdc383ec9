"""Tests of edge_sdk/agent."""
