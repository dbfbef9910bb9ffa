"""Triton kernels, one file per operation; the signatures and the meaning are gradstats.reference's.

Importing this package loads nothing: only the submodules import triton. They launch on CUDA
tensors, or on CPU tensors where TRITON_INTERPRET=1 was set before they were imported.
"""
