"""Kernels in ordinary torch operations, for devices that have none of their own: MPS, XPU, ROCm, CUDA without Triton.

Every operation is elementwise or moves elements, so it is rounded one by one and no sum depends on a device or on threads.
"""
