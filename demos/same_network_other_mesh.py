r"""The same network on another mesh
================================

A network whose bias and kernel are expanded in Laplace eigenfunctions of its label domain Y does not know the mesh of Y.
Here one network is made on one mesh, moved to coarser and finer ones, to other cells and to other spaces by `net.on`, and
run there on the same functions: its outputs f(., T) are approximations of one function, and their errors fall as h^2. Run

    containers/run python demos/same_network_other_mesh.py     (about half a minute; --short for 10 s)
    containers/run mpiexec -n 2 python -m mpi4py demos/same_network_other_mesh.py

It writes the errors on the disk and on the sphere to demos/output/, and draws one state on four meshes; the errors of the
full run are demos/same_network_other_mesh.txt, at the end of this page.
"""

import logging
import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
from matplotlib.figure import Figure
from scipy.spatial import cKDTree

from fem_resnet import LabelSpace, Layers, ResidualNetwork, laplace_basis, plot

# %% Meshes and spaces
# Triangles with continuous piecewise linear or piecewise constant functions, mass-lumped quadratic ones on the disk, and
# spectral elements on quadrilaterals on both. Each refinement halves the mesh size.


def disk_of_quads(refinement):
    """The unit disk in five blocks of quadrilaterals: a square in the middle, and one from each of its sides to the circle."""
    grid = np.linspace(-1, 1, 2**refinement + 1)
    outwards, along = np.meshgrid((grid + 1) / 2, grid, indexing="ij")
    side = np.stack([np.full_like(along, 0.5), along / 2], axis=2)
    circle = np.stack([np.cos(np.pi / 4 * along), np.sin(np.pi / 4 * along)], axis=2)
    block = side + outwards[:, :, None] * (circle - side)
    middle = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=2) / 2
    quarter = np.array([[0, 1], [-1, 0]])
    blocks = [middle, *(block @ np.linalg.matrix_power(quarter, k) for k in range(4))]
    # The same vertex of two blocks differs by round-off.
    vertices, numbers = np.unique(np.round(np.reshape(blocks, (-1, 2)), 12), axis=0, return_inverse=True)
    numbers = numbers.reshape(5, len(grid), len(grid))
    corners = numbers[:, :-1, :-1], numbers[:, 1:, :-1], numbers[:, 1:, 1:], numbers[:, :-1, 1:]
    cells = np.stack(corners, axis=3).reshape(-1, 4)
    return fd.Mesh(fd.mesh.plex_from_cell_list(2, cells, vertices, fd.COMM_WORLD))


SPACES = {
    "disk": [
        ("triangles CG1", fd.UnitDiskMesh, "CG", 1, (2, 3, 4, 5)),
        ("triangles DG0", fd.UnitDiskMesh, "DG", 0, (2, 3, 4, 5)),
        ("triangles KMV2", fd.UnitDiskMesh, "KMV", 2, (1, 2, 3, 4)),
        ("quads CG2", disk_of_quads, "CG", 2, (1, 2, 3, 4)),
    ],
    "sphere": [
        ("triangles CG1", fd.UnitIcosahedralSphereMesh, "CG", 1, (1, 2, 3, 4)),
        ("triangles DG0", fd.UnitIcosahedralSphereMesh, "DG", 0, (1, 2, 3, 4)),
        ("quads CG2", fd.UnitCubedSphereMesh, "CG", 2, (1, 2, 3, 4)),
    ],
}
#: Refinement of the mesh, in CG1, that stands for the limit.
FINEST = {"disk": 7, "sphere": 6}
#: How many eigenfunctions the network has, and with how many outputs are compared: repeated eigenvalues are kept whole.
RANK = {"disk": 6, "sphere": 9}
COMPARED = {"disk": 12, "sphere": 16}


def label_space(mesh, family, degree, refinement):
    """A label space on a mesh refined so many times."""
    return LabelSpace(fd.FunctionSpace(mesh(refinement), family, degree))


# %% One network
# Four layers with fixed random coefficients, made on a mesh of some hundred nodes. Its inputs are smooth functions of the
# coordinates.


def network(domain):
    """A network on a mesh of the domain in CG1, and eigenfunctions with which to compare outputs."""
    _, mesh, family, degree, _ = SPACES[domain][0]
    Y = label_space(mesh, family, degree, 3)
    basis = laplace_basis(Y, RANK[domain])
    net = ResidualNetwork(basis, bias=basis, layers=Layers(4, 2.0, steps=2), activation="tanh")
    random = np.random.default_rng(0)
    for layer in range(net.layers):
        net.kernel.set(layer, random.normal(size=(basis.rank, basis.rank)) / basis.rank**0.5)
        net.bias.set(layer, random.normal(size=basis.rank) / basis.rank**0.5)
    return net, laplace_basis(Y, COMPARED[domain])


def inputs(Y):
    """Three smooth functions at the nodes."""
    x, y = Y.coordinates[:, 0], Y.coordinates[:, 1]
    return Y.batch(np.column_stack([np.cos(2 * x + y), np.sin(3 * y) + x, x**2 - x * y]))


# %% What is compared
# Nothing has to be interpolated between meshes. The eigenfunctions move with the network (`Basis.on`), more of them than
# it has itself, and by Parseval the distance of coefficients is that of outputs in L2(Y), up to the part outside of
# their span. Between the meshes of one family there is another way: a vertex of a mesh is one of all its refinements.


class Output:
    """f(., T) of the network on a label space."""

    def __init__(self, net, compared, Y):
        self.Y = Y
        self.values = Y.values(net.on(Y)(inputs(Y)))
        self.coefficients = compared.on(Y).project(self.values)
        self.norm = float(Y.sum(Y.weights @ self.values**2).sum()) ** 0.5

    def distance(self, other):
        """Of the two outputs in L2(Y), as the eigenfunctions see it, relative to the other one's norm."""
        return np.linalg.norm(self.coefficients - other.coefficients) / other.norm

    def distance_at_nodes(self, other):
        """The same in the measure of this mesh, all of whose nodes are nodes of the other's too."""
        comm = self.Y.comm
        nodes = np.concatenate(comm.allgather(other.Y.coordinates))
        values = np.concatenate(comm.allgather(other.values))
        apart, nearest = cKDTree(nodes).query(self.Y.coordinates)
        assert comm.allreduce(apart.max(initial=0.0)) < 1e-10
        square = self.Y.weights @ (self.values - values[nearest]) ** 2
        return float(self.Y.sum(square).sum()) ** 0.5 / other.norm


def table(domain, net, compared, finest, short, say):
    """Errors on all meshes of a domain; returns the last observed order of each space, by both ways to compare."""
    say(f"\n{domain}, error of f(T) against {finest.Y.size} nodes in CG1 (observed order)")
    say(f"{'space':16s}{'nodes':>8s}{'in eigenfunctions':>24s}{'at shared nodes':>24s}")
    orders = []
    for name, mesh, family, degree, refinements in SPACES[domain]:
        rows = []
        for refinement in refinements[: 3 if short else None]:
            output = Output(net, compared, label_space(mesh, family, degree, refinement))
            row = [output.distance(finest)] + ([output.distance_at_nodes(finest)] if name.endswith("CG1") else [])
            rows.append(row)
            order = np.log2(np.divide(rows[-2], rows[-1])) if len(rows) > 1 else np.full(len(row), np.nan)
            cells = "".join(f"{error:15.2e} ({rate:.2f}) " if rate == rate else f"{error:15.2e}" + 8 * " "
                            for error, rate in zip(row, order))  # fmt: skip
            say(f"{name:16s}{output.Y.size:8d}{cells}".rstrip())
        orders += list(order)
    return orders


# %% The figure


def draw(path, net):
    """The same state on four label spaces of the disk: continuous, constant on cells, and continuous of degree two."""
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    for panel, (family, degree, refinement) in zip(
        figure.subplots(1, 4, sharey=True), [("CG", 1, 2), ("DG", 0, 3), ("KMV", 2, 2), ("CG", 1, 5)]
    ):
        Y = label_space(fd.UnitDiskMesh, family, degree, refinement)
        plot.function(Y, net.on(Y)(inputs(Y)), ax=panel, limits=(-2.5, 2.5), label="f(T)").label_outer()
        panel.set_title(f"{family}{degree}, {Y.size} nodes")
    path.parent.mkdir(exist_ok=True)
    plot.save(path, figure)


# %% All together


def main(short=False):
    """Returns the orders by the last refinement of each space."""
    comm, lines, start = fd.COMM_WORLD, [], time.perf_counter()
    output = Path(__file__).parent / "output"

    def say(text):
        if comm.rank == 0:
            print(text, flush=True)
            lines.append(text)

    orders = []
    for domain in SPACES:
        net, compared = network(domain)
        mesh = SPACES[domain][0][1]
        finest = Output(net, compared, label_space(mesh, "CG", 1, FINEST[domain] - (1 if short else 0)))
        inside = np.linalg.norm(finest.coefficients) / finest.norm
        orders += table(domain, net, compared, finest, short, say)
        say(f"{COMPARED[domain]} eigenfunctions hold all but {(1 - inside**2) ** 0.5:.1%} of f(T)")
        if domain == "disk":
            draw(output / "same_network_other_mesh.png", net)
    say(f"\nsmallest order by the last refinement: {min(orders):.2f}")
    if comm.rank == 0:
        (output / "same_network_other_mesh.txt").write_text("\n".join(lines).lstrip() + "\n")
        print(f"time: {time.perf_counter() - start:.0f} s")
    # What this page claims.
    assert min(orders) > 1.8
    return orders


if __name__ == "__main__":
    # On the coarsest meshes a part of the basis is lost and a warning says so; here the table does.
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)
    main(SHORT)
