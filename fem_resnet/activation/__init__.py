"""Activations: sigma, sigma', sigma'' and the primitive Sigma, as numbers, as C, and as what can be proved of them.

An activation is the sigma of (2.8). Its properties are what sections 3.1 to 3.5 ask of it: Lipschitz constants, monotonicity,
zeros. Users import `Activation`, `get_activation` and `ACTIVATIONS`; other folders also take the built-in formulas
(`pointwise`), the mean over a segment (`secant`), the C code (`code`) and proofs by intervals (`enclosure`, `extremes`).
Nothing here knows MPI, PETSc or a mesh.
"""
