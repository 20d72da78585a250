"""Triton kernels, one module per operator; importing a module registers its kernels.

They serve CUDA (and ROCm) tensors. Under `TRITON_INTERPRET=1`, read when Triton is imported, they
run in Triton's interpreter and serve CPU tensors instead.
"""
