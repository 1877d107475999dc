"""Parameters: the functions that a network learns, as a space basis times a time basis, with Riesz maps.

The kernel of (2.8) is b(y, z, t) = sum_ij phi_i(y) beta_ij(t) psi_j(z), an operator of low rank (`LowRankKernel`); bias and
beta are a `Parameter` each. `space_basis` says how Functions hold coefficients in space, with which inner product, and
`time_basis` which layers share them. `PositiveSemidefinite`, `DampedAntisymmetric` and `NormBounded` are sets of
kernels, images of free controls, and so are `LaplaceFunctions` and `Symmetric`, which know the symmetry of Y; `retraction`
keeps learned factors orthonormal.
"""
