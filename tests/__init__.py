"""The tests; they mirror the four packages."""
