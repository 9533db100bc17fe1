"""Benchmarks: `python -m benchmarks.NAME` prints a table, and one JSON object on its last line."""
