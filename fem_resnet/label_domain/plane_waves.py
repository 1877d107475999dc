"""Functions on Y as plane waves see them: integrals with waves fix rotations, signs and maps between meshes of one Y.

The waves cos(k . (x - centre) + phase) depend on the coordinates alone, so that no partition and no numbering changes the
integrals. Where the coordinates jump between cells, as at the seam of a periodic mesh, an integral with a wave goes cell by
cell, so that it has a limit under refinement. A graph is seen by waves in the numbers of its points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import firedrake as fd
import numpy as np
import scipy.linalg
import ufl
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from pyop2 import op2
from ufl import H1

from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.petsc import apply_columns
from fem_resnet.ranks import together

__all__ = ["PlaneWaves", "cross_gram", "fix_rotation"]

#: A direction of an eigenspace of which no wave sees more than this part has no rotation that round-off does not change.
_INVISIBLE = 1e-5

#: How much more equal eigenvalues count than integrals with waves, where a basis moves to another mesh. With 1 periodic meshes
#: still mix in modes far off; from 100 on modes of a mesh of 25 nodes, whose eigenvalues are off by a tenth, are taken for
#: others.
_SAME_EIGENVALUE = 10.0

#: How many waves are held at a time.
_WAVES = 256


class PlaneWaves:
    """Plane waves on a label domain, and the integrals of functions with them, whatever the partition.

    Parameters
    ----------
    Y
        The label space.

    Attributes
    ----------
    centre : numpy.ndarray
        The mean of the coordinates, shape (dimension,).
    spread : numpy.ndarray
        The covariance matrix of the coordinates, shape (dimension, dimension).
    length : float
        The root of the mean squared distance from the centre.
    """

    def __init__(self, Y: LabelSpace):
        self.Y = Y
        apart, self._to_apart = Y, None
        mesh = Y.V.mesh()
        if Y.V.ufl_element() in H1 and mesh.coordinates.function_space().ufl_element() not in H1:
            # A node at a seam has one place in each of its cells.
            apart = LabelSpace(fd.FunctionSpace(mesh, fd.BrokenElement(Y.V.ufl_element())))
            with stop_annotating():
                self._to_apart = fd.assemble(fd.interpolate(fd.TrialFunction(Y.V), apart.V)).petscmat
        self._apart = apart
        self._weights = apart.weights
        self._places = apart.coordinates if Y.graph is None else Y.numbers[:, None]
        self.centre = Y.sum(self._weights @ self._places) / Y.measure
        off = self._places - self.centre
        self.spread = Y.sum(off.T @ (off * self._weights[:, None])) / Y.measure
        self.length = float(np.trace(self.spread)) ** 0.5

    @property
    def unit(self) -> float:
        """The size of an eigenvalue: 1 / length^2, which the first positive one exceeds by the dimension at most."""
        if self.Y.graph is None:
            return self.length**-2
        return float(np.real(self.Y.stiffness.getDiagonal().sum())) / self.Y.measure or 1.0

    @cached_property
    def periods(self) -> np.ndarray:
        """How far the coordinates jump at the seams of a periodic mesh, shape (dimension,); infinite where they do not."""
        mesh = self.Y.V.mesh()
        periods = np.full(self._places.shape[1], np.inf)
        if mesh.coordinates.function_space().ufl_element() in H1:
            return periods
        space = fd.VectorFunctionSpace(mesh, "CG", 1, dim=periods.size)
        with stop_annotating():
            low, high = (
                fd.assemble(fd.interpolate(fd.SpatialCoordinate(mesh), space, access=access)).dat.data_ro.reshape(
                    -1, periods.size
                )
                for access in (op2.MIN, op2.MAX)
            )
        jumps = np.max(high - low, axis=0, initial=0.0)
        self.Y.comm.Allreduce(MPI.IN_PLACE, jumps, op=MPI.MAX)
        return np.where(jumps > 1e-9 * self.length, jumps, periods)

    def at_places(self, name: str, field: ufl.core.expr.Expr) -> np.ndarray:
        """A vector field at the places where functions are integrated, shape (places, dimension). Collective.

        Parameters
        ----------
        name
            How messages call the field.
        field
            A vector in UFL, of the mesh's coordinates.

        Raises
        ------
        ValueError
            If it has another shape, or cannot be interpolated.
        """
        space = fd.VectorFunctionSpace(self._apart.V.mesh(), self._apart.V.ufl_element(), dim=self._places.shape[1])

        def interpolate() -> fd.Function:
            if field.ufl_shape != space.value_shape:
                raise ValueError(f"{name}: expected a vector field of shape {space.value_shape}, got {field.ufl_shape}")
            try:
                return fd.Function(space).interpolate(field)
            except Exception as error:  # whatever UFL and its compiler say of an expression
                raise ValueError(f"{name}: expected a field that {space} can interpolate, got {field} ({error})") from error

        with stop_annotating():
            return together(self.Y.comm, interpolate).dat.data_ro.reshape(self._places.shape)

    def integrals(
        self,
        values: np.ndarray,
        frequencies: np.ndarray,
        centre: np.ndarray | None = None,
        *,
        periodic: bool = False,
        to: Callable[[np.ndarray], np.ndarray] | None = None,
        along: np.ndarray | None = None,
    ) -> np.ndarray:
        """Integrals of functions times plane waves, shape (functions, waves). Collective.

        Parameters
        ----------
        values
            The functions at the owned nodes, shape (nodes, functions).
        frequencies
            |k| of each wave, shape (waves,).
        centre
            Where the waves have their phase, shape (dimension,); the centre of Y if left out.
        periodic
            Whether waves have the periods of the mesh, so that they do not jump at a seam.
        to
            Takes places of Y to others: the waves at `to(y)` are taken.
        along
            A vector at each place (`at_places`): the derivatives of the waves along it are taken.
        """
        x = (self._places if to is None else to(self._places)) - (self.centre if centre is None else centre)
        # Directions and phases without any symmetry, so that no two waves tie and none misses an eigenspace.
        generator = np.random.default_rng(2020)
        directions = generator.standard_normal((x.shape[1], len(frequencies)))
        directions *= frequencies / np.linalg.norm(directions, axis=0)
        if periodic:
            unit = (2 * np.pi / self.periods)[:, None]
            jump = unit[:, 0] > 0
            directions[jump] = unit[jump] * np.rint(directions[jump] / unit[jump])
        phases = generator.uniform(0, 2 * np.pi, len(frequencies))
        weighted = (values if self._to_apart is None else apply_columns(self._to_apart, values)) * self._weights[:, None]
        parts = [
            weighted.T @ _waves(x, directions[:, k : k + _WAVES], phases[k : k + _WAVES], along)
            for k in range(0, len(frequencies), _WAVES)
        ]
        return self.Y.sum(np.hstack(parts))


def _waves(x: np.ndarray, directions: np.ndarray, phases: np.ndarray, along: np.ndarray | None) -> np.ndarray:
    """Waves at places, shape (places, waves), or their derivatives along a field."""
    if along is None:
        return np.cos(x @ directions + phases)
    return -np.sin(x @ directions + phases) * (along @ directions)


def fix_rotation(modes: np.ndarray, eigenvalue: float, waves: PlaneWaves) -> np.ndarray:
    """The orthonormal basis of an eigenspace that plane waves of its frequency, or near it, single out. Collective.

    Parameters
    ----------
    modes
        Any orthonormal basis of the eigenspace, at the owned nodes, shape (nodes, dimension).
    eigenvalue
        Its eigenvalue.
    waves
        The waves on the label domain.

    Raises
    ------
    ValueError
        If waves do not tell the functions of the eigenspace apart.
    """
    Y, count = waves.Y, modes.shape[1]
    own = max(eigenvalue, 0.0) ** 0.5
    for more in range(6):
        number = (2 * count + 6) * 2**more
        spread = np.random.default_rng(2022)
        if Y.graph is not None:
            frequencies = spread.uniform(0, np.pi, number)
        elif more == 0:
            frequencies = np.full(number, own)
        else:
            frequencies = (own + 2**more * count / waves.length) * spread.uniform(0, 2, number)
        Q, R, _ = scipy.linalg.qr(waves.integrals(modes, frequencies), mode="economic", pivoting=True)
        seen = np.diag(R)
        if abs(seen[-1]) > _INVISIBLE * Y.measure**0.5:
            return modes @ (Q * np.sign(seen))
    raise ValueError(
        f"Y: expected coordinates that tell the eigenfunctions of the eigenvalue {eigenvalue:.6g} apart, of which there are "
        f"{count}; {Y!r} seems to lie upon itself, so that their signs and rotations would depend on the partition. Give its "
        f"mesh coordinates that differ"
    )


def cross_gram(A: np.ndarray, B: np.ndarray, old: np.ndarray, new: np.ndarray, unit: float) -> np.ndarray:
    """X of Q X = P by least squares: `B^T X = A^T`, and X takes one stiffness into the other, `new X = X old`.

    Through waves alone, functions that the old mesh integrates badly would be mixed with eigenfunctions far off.

    Parameters
    ----------
    A, B
        Integrals of P and of Q with the same waves, shapes (functions of P, waves) and (functions of Q, waves).
    old, new
        Stiffness matrices of P and of Q, shapes (functions of P,) * 2 and (functions of Q,) * 2.
    unit
        The size of an eigenvalue.

    Returns
    -------
    numpy.ndarray
        X, shape (functions of Q, functions of P).
    """
    (old, P), (new, Q) = np.linalg.eigh(old), np.linalg.eigh(new)
    BB, BA = Q.T @ (B @ B.T) @ Q, Q.T @ (B @ A.T) @ P
    penalty = _SAME_EIGENVALUE * np.trace(BB) / len(BB)
    X = np.empty_like(BA)
    for j, eigenvalue in enumerate(old):
        apart = (new - eigenvalue) / (np.abs(new) + abs(eigenvalue) + 1e-3 * unit)
        X[:, j] = np.linalg.solve(BB + np.diag(penalty * apart**2), BA[:, j])
    return Q @ X @ P.T
