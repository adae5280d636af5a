"""Measurements behind the numbers in docs/. Run one as a module, for example `python -m benchmarks.cpu_step`."""
