"""Benchmarks that a user can run: `python -m perf`."""
