"""Benchmarks: one file a question; every result as JSON with units, sizes, host and the peers measured beside it."""
