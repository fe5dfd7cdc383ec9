"""Tests of coordinator/personal."""
