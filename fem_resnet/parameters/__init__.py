"""Parameters: the functions that a network learns, as a space basis times a time basis, with Riesz maps.

The kernel of (2.8) is b(y, z, t) = sum_ij phi_i(y) beta_ij(t) psi_j(z), an operator of low rank (`LowRankKernel`); bias and
beta are a `Parameter` each. `space_basis` has the coefficients in space with their inner product, `slots` the Functions that
hold them, `time_basis` the coefficients in time. `PositiveSemidefinite`, `DampedAntisymmetric` and `NormBounded` are sets of
kernels, images of free controls; `retraction` keeps learned factors orthonormal.
"""
