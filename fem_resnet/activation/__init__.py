"""Activations: sigma, sigma', sigma'' and the primitive Sigma, as numbers and as C, with properties that are proved.

An activation is the sigma of (2.8). Sections 3.1 to 3.5 suppose properties of it: Lipschitz constants, monotonicity, zeros.
Users import `Activation`, `Properties`, `get_activation` and `ACTIVATIONS`. Other folders also use `Secant`, the mean over a
segment, `activation_code`, the C code, and proofs by intervals (`expression_properties`). Nothing here knows MPI, PETSc or a
mesh.
"""
