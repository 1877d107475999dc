"""Function spaces V of nodes with weights, as a label space needs them, and the check of a given one.

The degrees of freedom of V must be the values at points of each cell, and the integrals of the basis functions over the cell
clearly positive. `check_space` looks at the element itself for both, and not at its name. It also refuses spaces that share or
restrict the degrees of freedom of another one, and meshes that lie folded in the plane.
"""

from __future__ import annotations

import FIAT
import finat.ufl
import firedrake as fd
import numpy as np
import ufl
from finat.element_factory import create_element
from mpi4py import MPI

from fem_resnet.ranks import watched

__all__ = ["WHAT_WORKS", "check_space"]

#: A weight of the reference cell below this part of the cell's measure is zero up to round-off.
_SMALLEST_WEIGHT = 1e-6

WHAT_WORKS = (
    "Spaces that work: DG of degree 0 or 1; CG of degree 1; CG of degree 3 on triangles; the default CG and DG "
    "(Gauss-Lobatto) on intervals, quadrilaterals and hexahedra; KMV on triangles (degree 1 to 5) and "
    "tetrahedra (degree 1 to 3)."
)


def check_space(V: fd.functionspaceimpl.WithGeometry, neighbours: bool = True) -> None:
    """Raise unless V is a scalar space of its own, nodal, with positive weights on the reference cell. Collective.

    Parameters
    ----------
    V
        The function space.
    neighbours
        Whether cells that share a facet must lie side by side; in `point_space` they may lie anywhere.

    Raises
    ------
    TypeError
        If V is no scalar function space, or part of another one.
    ValueError
        If V is not nodal, a weight is not clearly positive, or cells of the mesh lie on each other.
    """
    if V.value_shape != () or len(V) != 1:
        raise TypeError(f"V: expected a scalar space, got {V.ufl_element()} with values of shape {V.value_shape}")
    if V.index is not None or V.component is not None:
        raise TypeError("V: expected a space of its own, got a part of another one; give V.collapse()")
    if V.boundary_set:
        raise TypeError(
            f"V: expected a space with all its nodes, got one restricted on {', '.join(map(str, V.boundary_set))}; give the "
            f"FunctionSpace that it restricts"
        )
    mesh = V.mesh()
    if mesh.topological_dimension == 0:
        raise ValueError("V: expected a mesh of cells, got one of points alone; point_space(weights, points) takes points")
    _check_element(V.ufl_element())
    if neighbours and _is_folded(mesh):
        raise ValueError(
            "V: expected cells that lie side by side, got some that lie on each other, as when a surface was read without its "
            "last coordinate; read the file by read_mesh, or with the dimension of the surrounding space, Mesh(name, dim=3)"
        )


def _check_element(description: finat.ufl.FiniteElementBase) -> None:
    if description.family() in ("Real", "HDiv Trace"):
        raise ValueError(f"V: expected nodes in the cells of the mesh, {description} has none. {WHAT_WORKS}")
    if not isinstance(description.pullback, ufl.pullback.IdentityPullback):
        raise ValueError(f"V: expected point values as degrees of freedom, got {description}. {WHAT_WORKS}")
    for factor in _factors(create_element(description)):
        element = getattr(factor, "fiat_equivalent", None)
        if not hasattr(element, "degree"):  # a Quadrature element
            raise ValueError(f"V: expected functions between the nodes too, {description} has none. {WHAT_WORKS}")
        if not all(isinstance(dof, FIAT.functional.PointEvaluation) for dof in element.dual_basis()):
            raise ValueError(f"V: expected point values as degrees of freedom, got {description}. {WHAT_WORKS}")
        cell = element.get_reference_element()
        rule = FIAT.create_quadrature(cell, element.degree())
        table = element.tabulate(0, rule.get_points())[(0,) * cell.get_spatial_dimension()]
        smallest = (table @ rule.get_weights()).min() / rule.get_weights().sum()
        if smallest < _SMALLEST_WEIGHT:
            raise ValueError(
                f"V: expected positive weights, since an integral over Y is the sum of node values with these weights; "
                f"{description} has a node of weight {smallest:.2g} of its cell. {WHAT_WORKS}"
            )


def _factors(element):
    """The elements on simplices of which a tensor-product element is the product; its weights are products of theirs."""
    if hasattr(element, "product"):
        yield from _factors(element.product)
    elif hasattr(element, "factors"):
        for factor in element.factors:
            yield from _factors(factor)
    else:
        yield element


def _is_folded(mesh: fd.MeshGeometry) -> bool:
    """Whether two neighbours lie on one side of the facet between them, in a mesh of the line or of the plane. Collective.

    Some do so where a closed curve or surface has lost a coordinate. In more dimensions than its own a mesh may fold.
    """
    if mesh.extruded:
        mesh = mesh._base_mesh
    dimension = mesh.topological_dimension
    if dimension != mesh.geometric_dimension or dimension > 2:
        return False
    corners = _corner_nodes(mesh)
    if corners is None:
        return False
    facets = mesh.interior_facets
    x = mesh.coordinates.dat.data_ro_with_halos.reshape(-1, dimension)
    of_cells = x[mesh.coordinates.cell_node_map().values_with_halo[:, corners[0]]]  # cells, corners, dimension
    cells, numbers = facets.facet_cell[: facets.set.size], facets.local_facet_dat.data_ro.reshape(-1, 2)
    sides, along = [], []
    for k in range(2):
        own = of_cells[cells[:, k]]
        ends = np.take_along_axis(own, corners[1][numbers[:, k]][:, :, None], axis=1)
        inward = own.mean(axis=1) - ends[:, 0]
        along.append(ends[:, -1] - ends[:, 0])
        sides.append(inward[:, 0] if dimension == 1 else along[k][:, 0] * inward[:, 1] - along[k][:, 1] * inward[:, 0])
    if dimension == 2:  # the two cells may go along their facet in opposite directions
        sides[1] = sides[1] * np.sign(np.sum(along[0] * along[1], axis=1))
    return watched(mesh.comm).allreduce(bool((sides[0] * sides[1] >= 0).any()), op=MPI.LOR)


def _corner_nodes(mesh: fd.MeshGeometry) -> tuple[np.ndarray, np.ndarray] | None:
    """Which nodes of the coordinates are a cell's corners, and which corners each facet has; None if corners are no nodes."""
    element = create_element(mesh.coordinates.function_space().ufl_element().sub_elements[0]).fiat_equivalent
    if not all(isinstance(dof, FIAT.functional.PointEvaluation) for dof in element.dual_basis()):
        return None
    cell = element.get_reference_element()
    nodes = np.array([next(iter(dof.get_point_dict())) for dof in element.dual_basis()])
    distance = np.linalg.norm(nodes - np.array(cell.get_vertices())[:, None], axis=-1)
    if distance.min(axis=1).max() > 1e-12:
        return None
    facets = cell.get_topology()[cell.get_spatial_dimension() - 1]
    return distance.argmin(axis=1), np.array([facets[k] for k in sorted(facets)])
