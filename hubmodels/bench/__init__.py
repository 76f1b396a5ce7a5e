"""Benchmarks: hubmodels and other libraries on the same weights."""
