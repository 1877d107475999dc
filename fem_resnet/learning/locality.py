"""Locality: how fast a kernel's multipliers change with the mode.

Let x_1 .. x_m be functions that tell the places on Y apart: its coordinates. Multiplication by x_d, seen in the basis phi, and
the operator B of the kernel, where phi = psi, have a commutator there. The term is its squared norm,

    lambda/2 int sum_d | Pi x_d B - B Pi x_d |_HS^2 dt,       Pi the projection onto phi,

so that of the projection of (x_d(y) - x_d(z)) b(y, z): kernels that reach far are dear. With orthonormal phi, and for
B = k(-Laplace), whose coefficients are diagonal with the multipliers k_i, it is

    lambda/2 int sum_d sum_ij (phi_i, x_d phi_j)^2 (k_i - k_j)^2 dt.

On a circle of radius R, where x_d phi_j has parts in the two neighbours of the mode m alone, these are the squared differences
R^2 (k_m - k_(m+1))^2; on a sphere those of neighbouring degrees. Multiples of the identity, b = const delta(y - z), are free.
It does not depend on how eigenfunctions of one eigenvalue are turned, nor on the place of the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse

from fem_resnet.arguments import function, number, real_array
from fem_resnet.label_domain.basis import Basis
from fem_resnet.learning.regulariser import Regulariser
from fem_resnet.learning.term import Penalty, Quadratic, Term
from fem_resnet.parameters.kernel import KernelCoefficients
from fem_resnet.parameters.linear_kernels import LinearKernels
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.ranks import together
from fem_resnet.tape.kernel_controls import KernelSetParameter, MadeKernel

__all__ = ["Locality", "locality"]


@dataclass(frozen=True)
class Locality(Term):
    """The squared norm of the commutators with functions of the place; see `locality`.

    Attributes
    ----------
    embedding : callable or None
        From coordinates to the functions x_d.
    """

    quadratic = True

    embedding: Callable[[np.ndarray], np.ndarray] | None

    def on(self, parameter: Parameter) -> Penalty | None:
        if parameter.name != "kernel":
            return None
        made: dict[Basis, Callable[[np.ndarray], np.ndarray]] = {}
        kernels = parameter.among if isinstance(parameter, (KernelSetParameter, MadeKernel)) else None
        forms = []
        for basis in parameter.space_bases:
            assert isinstance(basis, KernelCoefficients), "a kernel is expanded in factors"
            phi = basis.kernel.phi
            if phi is not basis.kernel.psi or basis.has_learned_factors:
                what = "learned factors" if basis.has_learned_factors else "two"
                raise ValueError(
                    f"locality: expected a kernel with one fixed basis for phi and psi, got {what}; leave psi out"
                )
            if phi not in made:
                multiplications = [np.linalg.solve(phi.gram, X) for X in self.multiplications(phi)]
                if isinstance(kernels, LinearKernels):
                    made[phi] = _form_on(kernels, multiplications)
                else:
                    made[phi] = partial(_form, phi.gram, multiplications)
            forms.append(made[phi])
        return Quadratic(parameter, forms)

    def multiplications(self, phi: Basis) -> list[np.ndarray]:
        """The matrices of (phi_i, x_d phi_j), shape (rank, rank), one for each function of the place. Collective."""
        Y = phi.Y
        places = self.places(phi)
        centre = Y.sum(Y.weights @ places) / Y.measure  # it cancels, and so would digits
        return [Y.sum(phi.values.T @ (phi.values * (Y.weights * x)[:, None])) for x in (places - centre).T]

    def places(self, phi: Basis) -> np.ndarray:
        """The values of x_d at the owned nodes, shape (nodes, m). Collective."""
        Y = phi.Y
        if self.embedding is None:
            mesh = Y.V.mesh()
            if Y.numbers is not None:
                raise ValueError("locality: expected a label domain with a mesh, got points; give an embedding")
            if mesh.coordinates.function_space().finat_element.is_dg():
                raise ValueError(
                    "locality: expected coordinates that do not jump, got those of a periodic mesh; give an embedding: "
                    "lambda x: np.column_stack([np.cos(2 * np.pi * x[:, 0]), np.sin(2 * np.pi * x[:, 0])])"
                )
            return Y.coordinates
        embedding, x = self.embedding, Y.coordinates
        places = real_array("embedding", together(Y.comm, lambda: embedding(x.copy())), comm=Y.comm)
        Y.agree(
            places.ndim == 2 and places.shape[0] == Y.nodes,
            f"embedding: expected values of shape (nodes, any) = ({Y.nodes}, any), got {places.shape}",
        )
        return places


def _form(G: np.ndarray, multiplications: list[np.ndarray], beta: np.ndarray) -> np.ndarray:
    """The functional gamma -> sum_d <G (S beta - beta S^T) G, S gamma - gamma S^T>, S = G^-1 (phi, x_d phi)."""
    d = np.zeros(beta.shape)
    for S in multiplications:
        D = G @ (S @ beta - beta @ S.T) @ G
        d += S.T @ D - D @ S
    return d


def _form_on(kernels: LinearKernels, multiplications: list[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The same for beta = sum_k theta_k E_k, where G is the identity: a sparse matrix in theta, made once."""
    E, r = kernels.elements, kernels.rank
    transposed = np.arange(r**2).reshape(r, r).T.ravel()

    def product(S: scipy.sparse.csr_array, columns: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
        """S beta for each beta that is a column."""
        return (S @ columns.reshape((r, -1)).tocsr()).reshape(columns.shape).tocsr()

    A = scipy.sparse.csr_array((kernels.count, kernels.count))
    for X in multiplications:
        # Round-off apart, a place couples no channels, and on a circle neighbouring modes alone.
        S = scipy.sparse.csr_array(np.where(np.abs(X) > 1e-14 * np.abs(X).max(), X, 0.0))
        commutators = product(S, E.tocsr()) - product(S, E.tocsr()[transposed])[transposed]
        A += commutators.T @ commutators
    return lambda beta: (E @ (A @ (E.T @ beta.reshape(-1)))).reshape(beta.shape)


def locality(weight: float, embedding: Callable[[np.ndarray], np.ndarray] | None = None) -> Regulariser:
    """A penalty on how fast a kernel's multipliers change with the mode: a quadratic form, small for local kernels.

    It is lambda/2 times the integral over t of the squared Hilbert-Schmidt norms of the commutators of B with multiplication
    by the coordinates, seen in the basis of the kernel. For kernels k(-Laplace) it is a sum of squared differences of the
    k(lambda) of neighbouring modes. The kernel has one basis, for phi and psi; all other parameters are left out.

    Parameters
    ----------
    weight
        lambda >= 0. The form has the unit of the squared kernel, and of length^2 besides.
    embedding
        A function from coordinates of nodes, shape (nodes, dimension), to functions of the place, shape (nodes, any), in the
        place of the coordinates. Periodic meshes, whose coordinates jump, and graphs need one.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this kind; where it is evaluated, if the kernel has two bases or learned factors, or the label
        domain needs an embedding.

    Examples
    --------
    >>> R = locality(1e-3, lambda x: np.column_stack([np.cos(x[:, 0]), np.sin(x[:, 0])]))
    """
    if embedding is not None:
        function("embedding", embedding, "a function of coordinates, or None,")
    return Regulariser(((number("weight", weight, least=0), Locality(embedding)),), ("locality",))
