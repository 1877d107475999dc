"""Limits in depth and width of section 2.1, and kernels of low rank that stand for full ones.

`depth_limit` is Theorem 2.1 and `width_limit` Theorem 2.2; `from_network` and `to_network` lead from (2.1) to (2.8) and
back; `compress` approximates a kernel given as a function by one of low rank.
"""
