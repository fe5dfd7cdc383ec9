"""Tests of coordinator/admission."""
