"""Darcy flow on an irregular plate with three holes, meshes/plate.geo, about 2.1 x 1.5 in size.

    -div(exp(K) grad u) = 1,      u = 0 on the outer edge,      no flow through the edges of the holes.

The logarithm K of the permeability is a Gaussian field without a mean. Its covariance is s (9 - Laplace)^-2 with natural
conditions, in the first 200 eigenfunctions of the Laplacian on the plate; s is such that the variance of K is 1/4 in the mean
over the plate. A sample is K at 2,319 points and u there.

Both are finite element functions of degree 2 on the mesh that has these points for vertices: the file's mesh, refined once.
Held against solutions of degree 3 on the mesh refined twice, for the same K, u is good to 7e-4 of its norm in L2.
"""

from pathlib import Path

import firedrake as fd
import numpy as np
import scipy.sparse.linalg

from fem_resnet import read_mesh

MESH = Path(__file__).parents[2] / "meshes" / "plate.msh"
#: The mark of the outer edge in the mesh.
EDGE = 1
MODES, INVERSE_LENGTH, DEVIATION = 200, 3.0, 0.5


def plates(comm, refinements):
    """The mesh of the file and its refinements, of 611, 2,319 and 9,020 vertices, and so on."""
    return fd.MeshHierarchy(read_mesh(MESH, comm), refinements)


def sparse(form):
    """The matrix of a form."""
    matrix = fd.assemble(form).petscmat
    rows, columns, values = matrix.getValuesCSR()
    return scipy.sparse.csr_matrix((values, columns, rows), shape=matrix.size).tocsc()


def eigenfunctions(V, number):
    """The first eigenvalues of the Laplacian with natural conditions, and eigenfunctions of unit size in L2, one a column."""
    u, v = fd.TrialFunction(V), fd.TestFunction(V)
    stiffness, mass = sparse(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx), sparse(u * v * fd.dx)
    return scipy.sparse.linalg.eigsh(stiffness, number, mass, sigma=-1.0, v0=np.ones(V.dim()))


class Flow:
    """u for a given K, both in V."""

    def __init__(self, V):
        self.K, self.u = fd.Function(V), fd.Function(V)
        u, v = fd.TrialFunction(V), fd.TestFunction(V)
        a = fd.exp(self.K) * fd.inner(fd.grad(u), fd.grad(v)) * fd.dx(degree=6)
        problem = fd.LinearVariationalProblem(a, v * fd.dx, self.u, fd.DirichletBC(V, 0, EDGE), constant_jacobian=False)
        self._solver = fd.LinearVariationalSolver(
            problem, solver_parameters={"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}
        )

    def solve(self):
        """u for the present K."""
        self._solver.solve()
        return self.u


def samples(train: int, test: int) -> dict[str, np.ndarray]:
    """Training and test samples.

    Returns `K`, `u`, `test_K` and `test_u`, shape (samples, points); `points`, shape (points, 2); `weights` of the points,
    those of the lumped mass; and `cells`, shape (cells, 3), the numbers of the points that are the corners of a triangle.
    """
    mesh = plates(fd.COMM_SELF, 1)[1]
    V, vertices = (fd.FunctionSpace(mesh, "CG", degree) for degree in (2, 1))
    eigenvalues, functions = eigenfunctions(V, MODES)
    sizes = 1 / (INVERSE_LENGTH**2 + eigenvalues)
    sizes *= DEVIATION * np.sqrt(fd.assemble(1 * fd.dx(domain=mesh)) / np.sum(sizes**2))
    at_vertices = sparse(fd.interpolate(fd.TrialFunction(V), vertices))
    flow, found = Flow(V), {}
    for seed, (prefix, number) in enumerate((("", train), ("test_", test))):
        K = functions @ (sizes * np.random.default_rng(seed).standard_normal((number, MODES))).T
        u = np.empty_like(K)
        for sample in range(number):
            flow.K.dat.data_wo[:] = K[:, sample]
            u[:, sample] = flow.solve().dat.data_ro
        found |= {f"{prefix}K": (at_vertices @ K).T, f"{prefix}u": (at_vertices @ u).T}
    return found | {
        "points": mesh.coordinates.dat.data_ro.copy(),
        "weights": fd.assemble(fd.TestFunction(vertices) * fd.dx).dat.data_ro.copy(),
        "cells": vertices.cell_node_list.copy(),
    }
