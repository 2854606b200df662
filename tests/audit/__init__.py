"""Tests of the audit: records, attacks, report."""
