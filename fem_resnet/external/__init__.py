"""Networks inside of other programs: in PyTorch, in JAX, and in the residual of a PDE in Firedrake.

`network_function` has a network as a function of arrays, which these share. `torch` and `jax` are loaded where a user asks for
them, as `fem_resnet.external.torch` and `fem_resnet.external.jax`: the package needs neither.
"""
