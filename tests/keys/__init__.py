"""Tests of identities, key files, enrolment and rosters."""
