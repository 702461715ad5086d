"""Benchmarks: `python -m tests.bench` measures the agent and its peers side by side, in the same run."""
