"""Kernels for CUDA in Triton: the values of `cpu/`, one 4096-position stretch a program. Imported where they are used only."""
