"""Benchmarks: named cases as data, the oracle check before any time."""
