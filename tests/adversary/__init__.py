"""Attacks on the real machines: each first succeeds against one weakened guard, then fails against ours."""
