"""Runge-Kutta methods as PETSc TS makes them, and their partners for the adjoint equation.

A Runge-Kutta method with weights b_i and coefficients A_ij in t has one *partner* for the adjoint equation: with the partner,
the discrete adjoint of the method is the method applied to the adjoint equation. The partner has the same b_i, uses the stages
of the forward solve, and

    A^_ij = b_j - b_j A_ji / b_i,        b_i not 0.

In the time s = T - t, which runs backwards, this is b_j A_ji / b_i. It is explicit, with the stages in reversed order, if A
is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from petsc4py import PETSc

from fem_resnet.petsc import register_rk, rk_tableau

__all__ = ["Tableau", "probed_tableau", "tableau_of"]


@dataclass(frozen=True)
class Tableau:
    """A Runge-Kutta method as TS makes it: A_ij, b_i, c_i, and the kind of TS.

    Attributes
    ----------
    kind : str
        "rk", "theta" (one stage) or "endpoint".
    name : str
        Name of the TS's type and method.
    A, b, c : numpy.ndarray
        Coefficients, weights and nodes, shapes (stages, stages) and (stages,).
    """

    kind: str
    name: str
    A: np.ndarray
    b: np.ndarray
    c: np.ndarray

    @property
    def used(self) -> np.ndarray:
        """Numbers of the stages with b_i not 0, shape (number of them,)."""
        return np.flatnonzero(self.b)

    def factor(self, z: np.ndarray) -> np.ndarray:
        """The stability function `R(z) = 1 + z b^T (I - z A)^-1 1`: the factor of y in one step of y_t = c y, for z = h c.

        Parameters
        ----------
        z
            Complex numbers, any shape.

        Returns
        -------
        numpy.ndarray
            R(z), of the same shape.
        """
        z = np.asarray(z, dtype=complex)[..., None, None]
        stages = np.linalg.solve(np.eye(len(self.b)) - z * self.A, np.ones((*z.shape[:-2], len(self.b), 1)))
        return 1 + (z * (self.b @ stages)[..., None])[..., 0, 0]

    def partner(self) -> dict | None:
        """PETSc options of the partner: a TS that steps the adjoint equation backwards as the discrete adjoint does.

        The partner needs the forward stages in reversed order, without those with b_i = 0. There is no partner, and this is
        None, if another stage uses a stage with b_i = 0, or if no type of TS is the partner (the partner of Crank-Nicolson is
        not Crank-Nicolson).
        """
        if self.kind == "theta":
            return {"ts_type": "theta", "ts_theta_theta": float(self.c[-1])}
        used, unused = self.used, np.flatnonzero(self.b == 0)
        if self.kind != "rk" or self.A[np.ix_(used, unused)].any():
            return None
        A, b = self.A[np.ix_(used, used)], self.b[used]
        backwards = (b[None, :] * A.T / b[:, None])[::-1, ::-1]
        name = register_rk(
            f"fem_resnet_partner_of_{self.name}",
            tuple(map(tuple, backwards.tolist())),
            tuple(b[::-1].tolist()),
            tuple(backwards.sum(axis=1).tolist()),
        )
        return {"ts_type": "rk", "ts_rk_type": name}


def tableau_of(ts: PETSc.TS) -> Tableau:
    """The method of a TS, with the stages that TSGetStages gives."""
    if ts.getType() == "rk":
        return Tableau("rk", ts.getRKType(), *rk_tableau(ts))
    theta, endpoint = ts.getTheta(), ts.getThetaEndpoint()
    name = f"theta {theta:g}"
    if endpoint and theta < 1:
        A = np.array([[0.0, 0.0], [1 - theta, theta]])
        return Tableau("endpoint", f"{name}, endpoint", A, np.array([1 - theta, theta]), np.array([0.0, 1.0]))
    if theta == 1:
        return Tableau("theta", name, np.diag([0.0, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    return Tableau("theta", name, np.array([[theta]]), np.ones(1), np.array([theta]))


def probed_tableau(new_ts: Callable[[], PETSc.TS]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A_ij, b_i and c_i of an explicit Runge-Kutta method, found from one step of it.

    The right-hand side answers its call number j with the unit vector e_j, whatever it is asked. A step of length one from 0
    then asks at stage i for the state sum_j A_ij e_j at the time c_i, and ends in sum_j b_j e_j. So it serves types that keep
    their coefficients to themselves, such as ssp.

    Parameters
    ----------
    new_ts
        Makes a TS with its options, whose steps are fixed, on this process alone.

    Returns
    -------
    A, b, c : numpy.ndarray
        Shapes (stages, stages), (stages,), (stages,).
    """

    def step(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        asked: list[tuple[np.ndarray, float]] = []

        def slope(ts: PETSc.TS, t: float, y: PETSc.Vec, f: PETSc.Vec) -> None:
            f.array_w[...] = np.arange(size) == len(asked)
            asked.append((y.array_r.copy(), t))

        ts, y = new_ts(), PETSc.Vec().createSeq(size, comm=PETSc.COMM_SELF)
        ts.setRHSFunction(slope, y.duplicate())
        ts.setTime(0.0)
        ts.setTimeStep(1.0)
        ts.setMaxTime(1.0)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)  # type: ignore[arg-type]  # an int, against petsc4py's stubs
        ts.solve(y)
        ts.destroy()
        rows, nodes = zip(*asked)
        return np.array(rows), y.array_r.copy(), np.array(nodes)

    _, _, nodes = step(1)
    return step(len(nodes))
