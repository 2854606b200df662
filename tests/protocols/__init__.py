"""Tests of the secure sum and its records."""
