"""Heat in a gear: the law of heat_on_a_gear.py, samples of it, and derivatives of its solution operator.

The law. Y is the polygon of meshes/gear.geo, a gear of eight teeth with a hole, insulated all around. Heat is conducted the
better the farther the temperature u is from 0:

    u_t = div(k(u) grad u),    k(u) = 0.02 + 0.06 u^2,        k(u) du/dn = 0,        0 < t < 1.

Learned is the map from u(., 0) to u(., 1). It commutes with the 16 rotations and reflections of the gear, and is odd.

The inputs are Gaussian random fields, N(0, s^2 (25 - Laplace)^-4) with insulated boundary; s is such that the mean square of
u(., 0) is 1. Directions of derivatives are drawn by the same law.

The discretisation. With K(u) = 0.02 (u + u^3) the right-hand side is Laplace K(u), so that

    M u_t = -A K(u),        M (v_t) = -A (k(u) v)     for the derivative v in the direction v(., 0),

with the stiffness matrix A and the lumped mass matrix M of CG1 on the mesh of 1,104 nodes. PETSc's TS steps both by the
classical Runge-Kutta method: so v is the derivative of what is computed for u, to round-off.

Held against other solutions on five samples, relative in L2: the same on the mesh refined once differs by 0.11 to 0.30 %, and
quadratics in the weak form with k(u), by Crank and Nicolson in 30 steps, by 0.15 to 0.38 %. This is the error of the mesh.
Steps of half the length change 2e-12. So 1,200 samples take half a minute of a core.
"""

from pathlib import Path

import firedrake as fd
import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc
from petsctools import OptionsManager
from scipy.sparse.linalg import eigsh, splu

from fem_resnet import read_mesh

MESH = Path(__file__).parents[2] / "meshes" / "gear.msh"
CONDUCTIVITY, FINAL_TIME = 0.02, 1.0
#: Inputs vary over lengths of about 1 / ROUGHNESS.
ROUGHNESS = 5.0
#: So many samples are stepped at once: they fit the cache.
TOGETHER = 50


class Gear:
    """The matrices of CG1 on a mesh of the gear, the one of MESH if nothing is said. Not collective: on COMM_SELF.

    Attributes
    ----------
    V : FunctionSpace
        CG1.
    points : numpy.ndarray
        Its nodes, shape (nodes, 2).
    weights : numpy.ndarray
        Those of the nodes in integrals, the diagonal of M.
    """

    def __init__(self, mesh=None):
        mesh = mesh or read_mesh(MESH, fd.COMM_SELF)
        self.V = fd.FunctionSpace(mesh, "CG", 1)
        u, v = fd.TrialFunction(self.V), fd.TestFunction(self.V)
        self.points = mesh.coordinates.dat.data_ro.copy()
        self.weights = fd.assemble(v * fd.dx).dat.data_ro.copy()
        stiffness = fd.assemble(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx).petscmat
        self.stiffness = sp.csr_array(stiffness.getValuesCSR()[::-1], shape=stiffness.size)
        self._mass = sp.diags_array(self.weights)
        #: M^-1 A, and its largest eigenvalue.
        self._minus_laplace = (sp.diags_array(1 / self.weights) @ self.stiffness).tocsr()
        start = np.random.default_rng(0).standard_normal(len(self.weights))
        (self._fastest,) = eigsh(self.stiffness, 1, self._mass, v0=start, return_eigenvectors=False)

    def fields(self, samples: int, random: np.random.Generator) -> np.ndarray:
        """Random fields of mean square 1 in expectation, at the nodes: shape (nodes, samples)."""
        solve = splu((self.stiffness + ROUGHNESS**2 * self._mass).tocsc()).solve
        root = np.sqrt(self.weights)[:, None]

        def smooth(noise: np.ndarray) -> np.ndarray:
            return solve(root**2 * solve(root * noise))

        # The expectation of the integral of u^2 is the squared norm of noise -> u in Hilbert and Schmidt's sense.
        size = np.linalg.norm(root * smooth(np.eye(len(root))))
        return smooth(random.standard_normal((len(root), samples))) * np.sqrt(self.weights.sum()) / size

    def heat(self, u: np.ndarray, directions: np.ndarray | None = None, refined: int = 1) -> np.ndarray:
        """Temperatures at the end from those at the start, shape (nodes, samples), one a column.

        With directions, shape (number, nodes, samples), derivatives in these directions stand behind the temperatures: shape
        (1 + number, nodes, samples). Steps are as long as stability allows, or `refined` times shorter.
        """
        state = u[None] if directions is None else np.concatenate([u[None], directions])
        found = np.empty(state.shape)
        # What is as hot takes as many steps.
        order = np.argsort(np.abs(u).max(axis=0), kind="stable")
        for first in range(0, len(order), TOGETHER):
            few = order[first : first + TOGETHER]
            fastest = (
                self._fastest * CONDUCTIVITY * (1 + 3 * np.abs(u[:, few]).max() ** 2)
            )  # no temperature exceeds the first ones
            steps = refined * int(np.ceil(FINAL_TIME * fastest / 2.6))  # 2.78 is where stability ends
            found[:, :, few] = self._stepped(state[:, :, few], steps)
        return found if directions is not None else found[0]

    def _rate(self, state: np.ndarray) -> np.ndarray:
        u, squares = state[0], state[0] ** 2
        potential = np.empty(state.shape)
        potential[0] = u * (1 + squares)
        potential[1:] = (1 + 3 * squares) * state[1:]
        return np.stack([self._minus_laplace @ part for part in potential]) * -CONDUCTIVITY

    def _stepped(self, start: np.ndarray, steps: int) -> np.ndarray:
        def right_hand_side(ts, t, given, out):
            out.setArray(self._rate(given.array_r.reshape(start.shape)).ravel())

        state = PETSc.Vec().createWithArray(start.flatten(), comm=PETSc.COMM_SELF)
        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        ts.setRHSFunction(right_hand_side, state.duplicate())
        ts.setTimeStep(FINAL_TIME / steps)
        ts.setMaxSteps(steps)
        ts.setMaxTime(FINAL_TIME)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
        options = OptionsManager({"ts_type": "rk", "ts_rk_type": "4", "ts_adapt_type": "none"}, "heat_")
        ts.setOptionsPrefix("heat_")
        with options.inserted_options():
            ts.setFromOptions()
        ts.solve(state)
        return state.array_r.reshape(start.shape).copy()


def samples(count: int, seed: int) -> dict[str, np.ndarray]:
    """For `made_once`: `points` (nodes, 2), `weights` (nodes,), `inputs` and `targets` (count, nodes)."""
    gear = Gear()
    u = gear.fields(count, np.random.default_rng([seed, 0]))
    return {"points": gear.points, "weights": gear.weights, "inputs": u.T, "targets": gear.heat(u).T}


def derivatives(count: int, seed: int, number: int) -> dict[str, np.ndarray]:
    """For `made_once`: what `samples(count, seed)` gives, and derivatives in a number of random directions.

    `directions` and `derivatives` have the shape (count, number, nodes). The inputs are those of `samples`; more directions
    leave the first ones as they are.
    """
    gear = Gear()
    u = gear.fields(count, np.random.default_rng([seed, 0]))
    v = np.stack([gear.fields(count, np.random.default_rng([seed, k])) for k in range(1, number + 1)])
    found = gear.heat(u, v)
    return {
        "points": gear.points,
        "weights": gear.weights,
        "inputs": u.T,
        "targets": found[0].T,
        "directions": v.transpose(2, 0, 1),
        "derivatives": found[1:].transpose(2, 0, 1),
    }
