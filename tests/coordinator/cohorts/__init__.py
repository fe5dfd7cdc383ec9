"""Tests of coordinator/cohorts."""
