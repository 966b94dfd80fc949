"""Benchmarks: named cases as data, the oracle check before any time, dense attention as baseline in the same run."""
