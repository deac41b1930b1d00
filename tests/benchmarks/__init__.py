"""Benchmarks: measurements of the library that are no tests."""
