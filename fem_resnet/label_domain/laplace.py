"""Eigenfunctions of the Laplace-Beltrami operator with Neumann condition, or of the Laplacian of a graph.

    K x = lambda M x,      K_ij = int_Y grad(p_i) . grad(p_j) dy,     M = diag(w),

so they are orthonormal in the label measure itself. They depend on Y and not on its mesh; but under refinement modes
change their order, and in repeated eigenvalues any rotation is as good. On another mesh (Q, with M_2) they are turned
onto the original (P, with M_1) by the polar factor of the cross Gram matrix X. Both bases are seen through plane waves w,
so that no function of one mesh need be evaluated on the other, and X takes one stiffness into the other:

    A = P^T M_1 w,   B = Q^T M_2 w,     B^T X ~ A^T,   (Q^T K_2 Q) X ~ X (P^T K_1 P),
    X = U S V^T,     P on the new mesh = Q U V^T.

What waves see of the old functions is a mixture of what they see of the new; its singular values are 1 up to what the new
mesh does not resolve.

Plane waves fix rotations and signs too. Where the coordinates jump between cells, as at the seam of a periodic mesh, an
integral with a wave goes cell by cell, so that it has a limit under refinement, and no partition changes it. The eigenproblem
is solved in Y's own units: eigenvalues in those of `_Sight.unit`, and |Y| = 1.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import firedrake as fd
import numpy as np
import petsctools
import scipy.linalg
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating
from slepc4py import SLEPc
from ufl import H1

from fem_resnet.arguments import instance, integer
from fem_resnet.files import aside, seal, unsealed
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace, apply_columns, check_label_space
from fem_resnet.log import log
from fem_resnet.options import checked_options, checked_prefix, petsc_refusals, reason_name, refuse_unread, unread
from fem_resnet.ranks import same, together

__all__ = ["laplace_basis", "move_laplace"]

#: Shift-invert about a negative number, in units of Y's own: the Neumann Laplacian is singular at 0.
EIGENSOLVER_PARAMETERS = {
    "eps_gen_hermitian": None,
    "eps_target": -1.0,
    "eps_target_magnitude": None,
    "eps_tol": 1e-13,
    "eps_max_it": 500,
    "eps_purify": False,  # it would solve once more a mode to purge the kernel of M, which has none
    "st_type": "sinvert",
    "st_ksp_type": "preonly",
    "st_pc_type": "cholesky",
    "st_pc_factor_mat_solver_type": "mumps",
    "st_mat_mumps_icntl_14": 200,  # per cent of room to spare: its estimate is at times too small in parallel
}

#: Neighbours closer than this part of their value count as one repeated eigenvalue, which a mesh has split. The eigenvalue 0,
#: which Y has once a connected piece, is known to round-off of the largest, and values below count as this one, in Y's units.
CLUSTER_TOLERANCE, _SMALLEST = 1e-3, 1e-5

#: A direction of an eigenspace of which no wave has more than this part has no rotation that round-off does not change.
_INVISIBLE = 1e-5

#: How much more equal eigenvalues count than what waves see, where a basis moves to another mesh. With 1 periodic meshes still
#: mix in modes far off; from 100 on those of a mesh of 25 nodes, whose eigenvalues are off by a tenth, are taken for others.
_SAME_EIGENVALUE = 10.0

#: Functions that are as dependent as this in a discontinuous space are round-off.
_DEPENDENT = 1e-10


@PETSc.Log.EventDecorator("fem_resnet:laplace_basis")
def laplace_basis(
    Y: LabelSpace,
    rank: int,
    *,
    solver_parameters: dict | None = None,
    options_prefix: str | None = None,
    cache: str | Path | None = None,
) -> Basis:
    """Eigenfunctions of the Laplace-Beltrami operator (Neumann) to the `rank` smallest eigenvalues.

    Orthonormal in the label measure. Signs, and rotations within a repeated eigenvalue, are fixed by a rule that does
    not see the partition: among plane waves of the eigenvalue's frequency, fixed once and for all, the one with the
    largest part in the eigenspace gives the first function, and so on. Where these waves do not tell an eigenspace's functions
    apart, as those of the eigenvalue 0 of pieces that do not hang together, waves of other frequencies come to them. On a
    discontinuous space the eigenfunctions of the continuous space of the same degree (at least 1) are taken: averaged
    over the cells for DG of degree 0, else at the nodes; then made orthonormal by the closest orthonormal set. On a graph
    (`point_space`) they are the eigenvectors of its Laplacian. That no eigenvalue was missed is checked by the inertia of
    `K - s M` (Sylvester).

    Collective over the communicator of `Y`.

    Parameters
    ----------
    Y
        The label domain, of any cell type or embedding.
    rank
        How many functions, at least 1 and at most the number of nodes.
    solver_parameters
        Options of SLEPc's EPS, over `EIGENSOLVER_PARAMETERS`; eigenvalues there are in units of 1 / l^2, l the root of the
        mean squared distance from Y's centre (of a graph: in units of their mean, or so).
    options_prefix
        Prefix of these options.
    cache
        A directory where what was computed is kept, and looked for first: files of each rank, by a key made of the mesh's
        nodes and cells on all ranks, the space, the rank and `solver_parameters` (not of options on the command line). A file
        that is damaged, or not what was written, is made anew; where none can be written, a warning says so.

    Returns
    -------
    Basis
        With `eigenvalues`, ascending, in 1 / (unit of length)^2.

    Raises
    ------
    TypeError
        If `Y` is no LabelSpace, or another argument of another kind.
    ValueError
        If the rank is no integer in that range, SLEPc refuses an option or does not ask for it, or an argument differs between
        ranks; or the space is discontinuous and does not tell so many eigenfunctions apart;
        if Y is a set of points without a graph, or lies upon itself, so that its coordinates do not fix the functions.
    RuntimeError
        If the eigensolver does not find them all.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitSquareMesh
    >>> Y = LabelSpace(FunctionSpace(UnitSquareMesh(16, 16), "CG", 1))
    >>> laplace_basis(Y, 4).eigenvalues.round(1) + 0.0
    array([ 0. ,  9.8,  9.9, 19.7])
    """
    check_label_space(Y)
    same(Y.comm, rank=rank, solver_parameters=solver_parameters, options_prefix=options_prefix, cache=cache)
    if Y.numbers is not None and Y.graph is None:
        raise ValueError(
            f"Y: {Y!r} is a set of points, which has a Laplacian only with a graph; point_space(.., graph=A) has one"
        )
    rank = integer("rank", rank, most=Y.size)
    parameters, prefix = checked_options(solver_parameters), checked_prefix(options_prefix)
    instance("cache", cache, (str, os.PathLike, NoneType), "a directory")

    def find() -> _Modes:
        modes = _eigenfunctions(Y, rank, parameters, prefix)
        values = modes.values[:, :rank]
        seen = _told_apart(Y, values)
        if seen < rank:
            raise ValueError(
                f"rank: {Y.V.ufl_element()} on this mesh tells {seen} eigenfunctions apart, {rank} were asked for: by "
                f"its values the next one, of the eigenvalue {modes.eigenvalues[seen]:.6g}, is 0 or a sum of those before it; ask for "
                f"{seen} or fewer, refine the mesh or take a continuous space"
            )
        return modes._replace(values=_orthonormal(Y, values))

    modes = find() if cache is None else _kept(Path(cache), _key(Y, rank, solver_parameters), Y, find)
    ends = modes.ends.tolist()
    if rank not in ends:
        below, above = max([end for end in ends if end < rank], default=0), min(end for end in ends if end > rank)
        log(
            Y.comm, logging.WARNING,
            "rank %d cuts through the repeated eigenvalue %.6g: ranks %d and %d keep it whole",
            rank, modes.eigenvalues[rank - 1], below, above,
        )  # fmt: skip
    move = move_laplace if Y.graph is None else None
    return Basis(Y, modes.values, "laplace", modes.eigenvalues[:rank], move, modes.stiffness[:rank, :rank])


def _key(Y: LabelSpace, rank: int, parameters: dict | None) -> str:
    """What tells apart all that the eigenfunctions, and how the ranks hold them, depend on. Collective."""
    rule = 3  # what is kept, and how rotations are fixed
    mine = hashlib.sha256(repr((rule, Y.V.ufl_element(), rank, sorted((parameters or {}).items()))).encode())
    graph = Y.graph
    hangs = [Y.V.cell_node_map().values_with_halo] if graph is None else [graph.data, graph.indices, graph.indptr, Y.numbers]
    for array in (Y.coordinates, Y.weights, *hangs):
        mine.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return hashlib.sha256("".join(Y.comm.allgather(mine.hexdigest())).encode()).hexdigest()


def _kept(directory: Path, key: str, Y: LabelSpace, find: Callable[[], _Modes]) -> _Modes:
    """What an earlier call has left in files; else what `find` finds, kept for later calls."""
    name = f"{key}-{Y.comm.rank}"
    file = directory / f"{name}.npz"

    def read() -> _Modes | None:
        try:
            return _read(file, name, Y)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            logging.getLogger("fem_resnet").warning("cache: %s is made anew: %s", file, error)
            return None

    modes = together(Y.comm, read)
    if Y.comm.allreduce(modes is not None, op=MPI.LAND):
        return modes
    modes = find()

    def write() -> str | None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with aside(file, f"-{os.urandom(4).hex()}.part") as part:  # other processes may write it too
                with open(part, "wb") as opened:
                    np.savez(opened, name=name, **modes._asdict())
                seal(None, part)
        except OSError as error:
            return str(error)

    failures = [failure for failure in Y.comm.allgather(together(Y.comm, write)) if failure]
    if failures:  # what was found is not thrown away for that
        log(Y.comm, logging.WARNING, "cache: eigenfunctions are not kept: %s", failures[0])
    return modes


def _read(file: Path, name: str, Y: LabelSpace) -> _Modes:
    """What a file of the cache holds, if it is what was written under this name."""
    with np.load(io.BytesIO(unsealed(file))) as arrays:
        if set(arrays.files) != {"name", *_Modes._fields} or arrays["name"] != name:
            raise ValueError("it holds something else")
        modes = _Modes(**{field: arrays[field] for field in _Modes._fields})
    count = len(modes.eigenvalues)
    if modes.values.shape != (Y.nodes, count) or modes.stiffness.shape != (count, count):
        raise ValueError("it holds arrays of other shapes")
    return modes


class _Modes(NamedTuple):
    """Eigenfunctions, in whole eigenspaces of a fixed rotation.

    On a discontinuous space `values` are at first what it sees of the continuous functions. In an eigenspace that the mesh
    has split the rotated functions are no eigenfunctions: `stiffness` is diagonal in blocks only.
    """

    eigenvalues: np.ndarray
    #: Where eigenspaces end, ascending.
    ends: np.ndarray
    values: np.ndarray
    stiffness: np.ndarray


def _eigenfunctions(Y: LabelSpace, rank: int, parameters: dict, prefix: str | None) -> _Modes:
    """The first `rank` eigenpairs, and what else belongs to the last one's eigenspace."""
    C, to_nodes = _with_stiffness(Y)
    if rank > C.size:
        raise ValueError(f"rank: {C.size} eigenfunctions exist on {C.V.ufl_element()}, {rank} were asked for")
    sight = _Sight(C)
    eigenvalues, modes = _whole_clusters(C, sight.unit, rank, parameters, prefix)
    ends = _cluster_ends(eigenvalues / sight.unit)
    # What else was found depends on the eigensolver.
    ends = ends[: 1 + bisect.bisect_left(ends, rank)]
    eigenvalues, modes = eigenvalues[: ends[-1]], modes[:, : ends[-1]]
    for start, end in zip([0, *ends], ends):
        modes[:, start:end] = _fix_rotation(modes[:, start:end], eigenvalues[start:end].mean(), sight)
    stiffness = C.sum(modes.T @ C.apply_stiffness(modes))
    return _Modes(eigenvalues, np.array(ends), to_nodes(modes), (stiffness + stiffness.T) / 2)


def _with_stiffness(Y: LabelSpace) -> tuple[LabelSpace, Callable]:
    """A continuous space in which eigenfunctions are sought, and the map from its node values to those of Y."""
    element = Y.V.ufl_element()
    if element in H1 or Y.graph is not None:
        return Y, lambda modes: modes
    degree = max(element.embedded_superdegree, 1) if element.embedded_superdegree <= 1 else element.embedded_subdegree
    C = LabelSpace(fd.FunctionSpace(Y.V.mesh(), "CG", degree))
    with stop_annotating():
        if element.embedded_superdegree == 0:
            to_Y = fd.assemble(fd.inner(fd.TrialFunction(C.V), fd.TestFunction(Y.V)) * fd.dx).petscmat
            scale = 1 / Y.weights
        else:
            to_Y = fd.assemble(fd.interpolate(fd.TrialFunction(C.V), Y.V)).petscmat
            scale = np.ones(Y.nodes)

    return C, lambda modes: scale[:, None] * apply_columns(to_Y, modes)


def _gram(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    return Y.sum((values * Y.weights[:, None]).T @ values)


def _told_apart(Y: LabelSpace, values: np.ndarray) -> int:
    """How many of these functions, the first ones, are independent at the nodes."""
    gram = _gram(Y, values)
    # The smallest eigenvalue of a leading block falls with its size.
    return bisect.bisect_left(
        range(1, len(gram) + 1), True, key=lambda size: np.linalg.eigvalsh(gram[:size, :size])[0] < _DEPENDENT
    )


def _orthonormal(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """The closest orthonormal functions: G^(-1/2) turns with a rotation of the functions, a QR would not."""
    if Y.V.ufl_element() in H1 or Y.graph is not None:
        return values  # they are
    sizes, directions = np.linalg.eigh(_gram(Y, values))
    return values @ (directions / np.sqrt(sizes)) @ directions.T


def _whole_clusters(
    C: LabelSpace, unit: float, rank: int, parameters: dict, prefix: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """At least `rank` smallest eigenpairs of (K, M), up to the end of a repeated eigenvalue."""
    # No threshold of a library that is absolute then sees the units.
    K = C.stiffness.copy()
    K.scale(1 / (unit * C.measure))
    w = K.createVecRight()
    w.array_w[:] = C.weights / C.measure
    M = K.duplicate()
    M.setDiagonal(w)
    M.assemble()
    wanted = min(rank + 4, C.size)
    eigenvalues, modes = _smallest_eigenpairs(K, M, wanted, parameters, prefix)
    for _ in range(10):
        if len(eigenvalues) == C.size:
            return eigenvalues * unit, modes / C.measure**0.5
        # The last cluster may go on beyond what was found.
        complete = _cluster_ends(eigenvalues)[-2:-1]
        if not complete or complete[0] < rank:
            wanted = min(wanted + max(4, wanted // 2), C.size)
            eigenvalues, modes = _smallest_eigenpairs(K, M, wanted, parameters, prefix)
            continue
        end = complete[0]
        missing = _count_below(K, M, (eigenvalues[end - 1] + eigenvalues[end]) / 2) - end
        if missing == 0:
            return eigenvalues[:end] * unit, modes[:, :end] / C.measure**0.5
        # Krylov spaces may hold one copy only of a repeated eigenvalue: the others are orthogonal to what was found.
        more, more_modes = _smallest_eigenpairs(K, M, missing, parameters, prefix, orthogonal_to=modes)
        order = np.argsort(np.concatenate([eigenvalues, more]), kind="stable")
        eigenvalues = np.concatenate([eigenvalues, more])[order]
        modes = np.column_stack([modes, more_modes])[:, order]
    raise RuntimeError(
        f"laplace_basis: the eigensolver keeps missing eigenvalues below {eigenvalues[-1] * unit:.6g}; "
        f"a larger 'eps_ncv' or a smaller 'eps_tol' in solver_parameters may help"
    )


def _smallest_eigenpairs(
    K, M, count: int, parameters: dict, prefix: str | None, orthogonal_to: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    eps = SLEPc.EPS().create(comm=K.comm)
    eps.setOperators(K, M)
    eps.setDimensions(nev=count)
    if orthogonal_to is not None:
        space = []
        for mode in orthogonal_to.T:
            x = K.createVecRight()
            x.array_w[:] = mode
            space.append(x)
        eps.setDeflationSpace(space)
    with petsc_refusals(parameters):
        petsctools.set_from_options(
            eps, parameters=EIGENSOLVER_PARAMETERS | parameters, options_prefix=prefix, default_prefix="fem_resnet_laplace"
        )
    with petsctools.inserted_options(eps):
        eps.setUp()  # the linear solver reads its options here
        refuse_unread(unread(petsctools.get_options(eps), parameters), f"SLEPc's EPS of type {eps.getType()!r}")
        eps.solve()
    found = eps.getConverged()
    if found < count:
        raise RuntimeError(
            f"laplace_basis: SLEPc found {found} of {count} eigenvalues in {eps.getIterationNumber()} iterations, "
            f"{reason_name(SLEPc.EPS, eps.getConvergedReason())}; try a larger 'eps_ncv' or 'eps_max_it' in solver_parameters"
        )
    x = K.createVecRight()
    eigenvalues, modes = np.empty(count), np.empty((x.getLocalSize(), count))
    for k in range(count):
        eigenvalues[k] = eps.getEigenpair(k, x).real
        modes[:, k] = x.array_r
    eps.destroy()
    order = np.argsort(eigenvalues, kind="stable")
    return eigenvalues[order], modes[:, order]


def _count_below(K, M, shift: float) -> int:
    """How many eigenvalues lie below `shift`: the negative pivots of `K - shift M`."""
    A = K.copy()
    A.axpy(-shift, M)
    pc = PETSc.PC().create(comm=K.comm)
    pc.setOperators(A)
    petsctools.set_from_options(
        pc,
        parameters={
            "pc_type": "cholesky",
            "pc_factor_mat_solver_type": "mumps",
            "mat_mumps_icntl_13": 1,  # no ScaLAPACK at the root, which does not count pivots
            "mat_mumps_icntl_24": 1,
            "mat_mumps_icntl_14": 200,
        },
        default_prefix="fem_resnet_inertia",
    )
    with petsctools.inserted_options(pc):
        pc.setUp()
        negative, _, _ = pc.getFactorMatrix().getInertia()
    pc.destroy()
    A.destroy()
    return negative


def _cluster_ends(eigenvalues: np.ndarray) -> list[int]:
    gaps = np.diff(eigenvalues) > CLUSTER_TOLERANCE * np.maximum(np.abs(eigenvalues[1:]), _SMALLEST)
    return [*(np.flatnonzero(gaps) + 1).tolist(), len(eigenvalues)]


class _Sight:
    """How plane waves see functions on Y, whatever its partition.

    Parameters
    ----------
    Y
        The label space; a graph is seen in its points' numbers.

    Attributes
    ----------
    centre : numpy.ndarray
        The mean of the coordinates.
    length : float
        The root of the mean squared distance from there.
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
        self._weights = apart.weights
        self._places = apart.coordinates if Y.graph is None else Y.numbers[:, None]
        self.centre = Y.sum(self._weights @ self._places) / Y.measure
        self.length = float(Y.sum(self._weights @ (self._places - self.centre) ** 2).sum() / Y.measure) ** 0.5

    @property
    def unit(self) -> float:
        """The size of an eigenvalue: 1 / length^2, which the first positive one does not exceed by more than the dimension."""
        if self.Y.graph is None:
            return self.length**-2
        return self.Y.stiffness.getDiagonal().sum() / self.Y.measure or 1.0

    def through(self, values: np.ndarray, frequencies: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
        """Integrals of functions times plane waves of these frequencies about the centre, shape (functions, waves)."""
        x = self._places - (self.centre if centre is None else centre)
        # Directions and phases without any symmetry, so that no two waves tie and none misses an eigenspace.
        generator = np.random.default_rng(2020)
        directions = generator.standard_normal((x.shape[1], len(frequencies)))
        directions *= frequencies / np.linalg.norm(directions, axis=0)
        phases = generator.uniform(0, 2 * np.pi, len(frequencies))
        weighted = (values if self._to_apart is None else apply_columns(self._to_apart, values)) * self._weights[:, None]
        parts = [
            weighted.T @ np.cos(x @ directions[:, k : k + _WAVES] + phases[k : k + _WAVES])
            for k in range(0, len(frequencies), _WAVES)
        ]
        return self.Y.sum(np.hstack(parts))


#: How many waves are held at a time.
_WAVES = 256


def _cross_gram(A: np.ndarray, B: np.ndarray, old: np.ndarray, new: np.ndarray, unit: float) -> np.ndarray:
    """X of Q X = P by least squares: `B^T X = A^T`, and X takes the one stiffness into the other, `new X = X old`.

    Through waves alone, functions that the old mesh integrates badly would be mixed with eigenfunctions far off.
    """
    (old, P), (new, Q) = np.linalg.eigh(old), np.linalg.eigh(new)
    BB, BA = Q.T @ (B @ B.T) @ Q, Q.T @ (B @ A.T) @ P
    penalty = _SAME_EIGENVALUE * np.trace(BB) / len(BB)
    X = np.empty_like(BA)
    for j, eigenvalue in enumerate(old):
        apart = (new - eigenvalue) / (np.abs(new) + abs(eigenvalue) + 1e-3 * unit)
        X[:, j] = np.linalg.solve(BB + np.diag(penalty * apart**2), BA[:, j])
    return Q @ X @ P.T


def _fix_rotation(modes: np.ndarray, eigenvalue: float, sight: _Sight) -> np.ndarray:
    """The orthonormal basis of the span of `modes` that plane waves of this frequency, or near it, single out."""
    Y, count = sight.Y, modes.shape[1]
    own = max(eigenvalue, 0.0) ** 0.5
    for more in range(6):
        waves = (2 * count + 6) * 2**more
        spread = np.random.default_rng(2022)
        if Y.graph is not None:
            frequencies = spread.uniform(0, np.pi, waves)
        elif more == 0:
            frequencies = np.full(waves, own)
        else:
            frequencies = (own + 2**more * count / sight.length) * spread.uniform(0, 2, waves)
        Q, R, _ = scipy.linalg.qr(sight.through(modes, frequencies), mode="economic", pivoting=True)
        seen = np.diag(R)
        if abs(seen[-1]) > _INVISIBLE * Y.measure**0.5:
            return modes @ (Q * np.sign(seen))
    raise ValueError(
        f"Y: functions of the coordinates do not tell the eigenfunctions of the eigenvalue {eigenvalue:.6g} apart, of which "
        f"there are {count}, so their signs and rotations would depend on the partition; {Y!r} seems to lie upon itself: "
        f"give its mesh coordinates that differ"
    )


def move_laplace(basis: Basis, Y: LabelSpace) -> Basis:
    """A Laplace basis on another label space of the same Y. Collective over the communicators of both.

    What the new space does not resolve is logged: the largest part of a function at level INFO, from a tenth on as a warning.
    The `eigenvalues` of the result are the functions' Rayleigh quotients.

    Parameters
    ----------
    basis
        The original.
    Y
        Another label space of the same label domain.

    Raises
    ------
    ValueError
        If Y is a set of points, lies in a space of another dimension, or has or tells apart fewer eigenfunctions than the basis.
    """
    dimensions = [space.coordinates.shape[1] for space in (basis.Y, Y)]
    if Y.numbers is not None or dimensions[0] != dimensions[1]:
        what = "a set of points" if Y.numbers is not None else "in a space of {1} dimensions, not {0}".format(*dimensions)
        raise ValueError(f"Y: expected a label space of the same Y, {basis.Y!r}; {Y!r} is {what}")
    available = min(Y.size, _with_stiffness(Y)[0].size)
    if available < basis.rank:
        raise ValueError(f"Y: expected at least {basis.rank} nodes, one a function; {Y!r} has {available}")
    # A buffer, since modes that were among the first need not be so on the other mesh.
    modes = _eigenfunctions(Y, min(basis.rank + max(4, basis.rank // 4), available), {}, None)
    seen = _told_apart(Y, modes.values)
    if seen < basis.rank:
        raise ValueError(f"Y: expected one that tells {basis.rank} eigenfunctions apart, {Y!r} tells {seen}; refine its mesh")
    values = _orthonormal(Y, modes.values[:, :seen])
    # Waves that depend on the original alone, so that all its copies have one limit.
    old, new = _Sight(basis.Y), _Sight(Y)
    # Pieces that do not hang together, or hardly, are told apart by waves of their size.
    pieces = np.count_nonzero(basis.eigenvalues < 1e-2 * old.unit)
    highest = max(max(basis.eigenvalues.max(), 0.0) ** 0.5, pieces / old.length)
    frequencies = highest * np.random.default_rng(2021).uniform(0, 1.2, 16 * basis.rank + 64)
    A = old.through(basis.values, frequencies)
    B = new.through(values, frequencies, old.centre)
    U, _, V = np.linalg.svd(_cross_gram(A, B, basis.stiffness, modes.stiffness[:seen, :seen], old.unit), full_matrices=False)
    turn = U @ V
    # The original as waves see it, out of what became of it.
    lost = float(np.abs(1 - np.linalg.svdvals(np.linalg.lstsq(B.T @ turn, A.T)[0])).max())
    log(
        Y.comm, logging.WARNING if lost > 0.1 else logging.INFO,
        "%d functions moved from %s to %s: a part of %.1e is lost", basis.rank, basis.Y, Y, lost,
    )  # fmt: skip
    stiffness = turn.T @ modes.stiffness[:seen, :seen] @ turn
    return Basis(Y, values @ turn, "laplace", np.diag(stiffness).copy(), move_laplace, stiffness)
