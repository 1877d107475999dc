"""The label domain Y: nodes, weights, inner product and batches on a mesh; bases of functions on it.

Integrals over Y in (2.8) are sums over nodes, int f dy = sum_i w_i f(y_i). `LabelSpace` holds the weights. `read_mesh` reads a
mesh; `class_space` and `point_space` make domains without one. `laplace_basis`, `cell_indicators` and `given_basis` make
bases, and `orthonormal` makes them orthonormal. Modules here know Firedrake, MPI, PETSc and SLEPc, and nothing of networks.
"""
