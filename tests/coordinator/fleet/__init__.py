"""Tests of coordinator/fleet."""
