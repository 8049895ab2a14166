"""Compiled kernels for the CPU: numba functions on contiguous float32 runs, one thread each (see base.py)."""
