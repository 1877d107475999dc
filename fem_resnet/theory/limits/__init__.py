"""Section 2: limits in depth and width, residual networks as arrays, and kernels of low rank in place of full ones.

`depth_limit` is Theorem 2.1 and `width_limit` Theorem 2.2. `from_network` and `to_network` convert between (2.1) and (2.8).
`compress` approximates a full kernel by one of low rank; `KernelSampling` says when it may sample the kernel.
"""
