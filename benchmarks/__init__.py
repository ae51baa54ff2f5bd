"""Benchmarks: `python -m benchmarks --list` names the suites, `python -m benchmarks NAME` runs one."""
