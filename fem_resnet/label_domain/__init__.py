"""The label domain Y: nodes, weights, inner product and batches on a mesh; bases of functions on it.

Integrals over Y in (2.8) are sums over nodes, int f dy = sum_i w_i f(y_i). `LabelSpace` holds the weights; `class_space`,
`point_space` and `read_mesh` make domains without geometry and from files; `laplace_basis`, `cell_indicators` and
`given_basis` make bases. A line here knows Firedrake, MPI, PETSc and SLEPc, and nothing of networks.
"""
