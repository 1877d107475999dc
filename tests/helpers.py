"""Domains, label spaces, bases and a functional that the tests share: a new kernel costs 0.3 s, so few exist."""

import os
import re
from functools import cache
from pathlib import Path

import firedrake as fd
import numpy as np
import sympy
from firedrake import COMM_SELF, COMM_WORLD

from fem_resnet import Basis, Bias, Channels, Kernel, LabelSpace, Layers, ResidualNetwork, laplace_basis, read_mesh
from fem_resnet.parameters.space_basis import BatchValues
from fem_resnet.tape.recording import apply

#: Number of samples of all batches, unless a test is about that number.
SAMPLES = 3

#: Layers of unequal lengths, which do not add up to one.
TIMES = (0.0, 0.2, 0.9, 1.3)

#: An activation of a user's own.
SWISH = sympy.Symbol("s") / (1 + sympy.exp(-sympy.Symbol("s")))


class Polygon:
    """A polygon by its rings of vertices: the outer one counterclockwise, holes clockwise."""

    def __init__(self, *rings):
        self.rings = [np.array(ring, dtype=float) for ring in rings]

    def integral(self, antiderivative) -> float:
        """int F_x dx dy = closed line integral of F dy (Green), for an antiderivative in x, ``F(x, y)``.

        Analytic F to round-off: 20 Gauss points an edge.
        """
        nodes, weights = np.polynomial.legendre.leggauss(20)
        total = 0.0
        for ring in self.rings:
            for start, end in zip(ring, np.roll(ring, -1, axis=0)):
                x, y = ((start + end) / 2)[:, None] + ((end - start) / 2)[:, None] * nodes
                total += antiderivative(x, y) @ weights * (end - start)[1] / 2
        return float(total)


#: The domains of the meshes in files: meshes/polygon.geo, and the ground of meshes/block.geo (height 1/2).
POLYGON = Polygon([(0, 0), (2, 0.2), (1.8, 1.1), (1, 0.9), (0.9, 1.7), (-0.2, 1.5)], [(0.3, 0.6), (0.4, 1.0), (0.7, 0.5)])
BLOCK = Polygon([(0, 0), (1.5, 0), (1.4, 0.6), (0.7, 0.5), (0.6, 1.2), (-0.1, 1.1)])
UNIT_SQUARE = Polygon([(0, 0), (1, 0), (1, 1), (0, 1)])

#: Gmsh meshes, with their sources.
MESHES = Path(__file__).parents[1] / "meshes"


def without_mpi() -> dict[str, str]:
    """The environment of this process without what MPI left in it, which must not reach another process of MPI."""
    leaked = re.compile(r"(OMPI_(?!MCA_rmaps|ALLOW)|PMIX_|OPAL_|PRTE_|PMI_)")
    return {name: value for name, value in os.environ.items() if not leaked.match(name)}


def from_file(name: str, refinement: int, comm) -> fd.MeshGeometry:
    """The mesh of a file, refined uniformly: `refinement` counts from 1, the mesh as it is."""
    return fd.MeshHierarchy(read_mesh(MESHES / name, comm), refinement - 1)[-1]


DOMAINS = {
    "interval": lambda n, comm: fd.UnitIntervalMesh(8 * n, comm=comm),
    "disk": lambda n, comm: fd.UnitDiskMesh(n, comm=comm),
    "annulus": lambda n, comm: fd.AnnulusMesh(1, 0.4, 3 * n, 12 * n, comm=comm),
    "sphere": lambda n, comm: fd.UnitIcosahedralSphereMesh(n, comm=comm),
    "square": lambda n, comm: fd.UnitSquareMesh(3 * n, 3 * n, quadrilateral=True, comm=comm),
    "cube": lambda n, comm: fd.UnitCubeMesh(2 * n, 2 * n, 2 * n, comm=comm),
    "hexes": lambda n, comm: fd.UnitCubeMesh(2 * n, 2 * n, 2 * n, hexahedral=True, comm=comm),
    "prisms": lambda n, comm: fd.ExtrudedMesh(fd.UnitSquareMesh(3 * n, 3 * n, comm=comm), 2 * n),
    "polygon": lambda n, comm: from_file("polygon.msh", n, comm),
    "block": lambda n, comm: from_file("block.msh", n, comm),
    "prisms on the polygon": lambda n, comm: fd.ExtrudedMesh(from_file("polygon.msh", n, comm), 2 * n, 0.5 / n),
}

#: Label spaces of every kind that is allowed, and of every kind of mesh.
SPACES = [
    ("interval", "DG0"),
    ("interval", "CG3"),
    ("disk", "DG0"),
    ("disk", "DG1"),
    ("disk", "CG1"),
    ("disk", "CG3"),
    ("disk", "KMV2"),
    ("annulus", "DG0"),
    ("annulus", "CG2"),
    ("sphere", "DG0"),
    ("sphere", "CG1"),
    ("square", "CG3"),
    ("cube", "DG0"),
    ("cube", "CG1"),
    ("hexes", "CG2"),
    ("prisms", "CG1"),
    ("polygon", "CG1"),
    ("polygon", "KMV3"),
    ("block", "CG1"),
]


def name(space: tuple) -> str:
    """Name of a test's parameter."""
    return "-".join(map(str, space))


def mesh(domain: str, refinement: int = 1, alone: bool = False) -> fd.MeshGeometry:
    """A mesh of `domain` on all ranks, or the whole of it on each rank alone."""
    return _mesh(domain, refinement, alone)


def label_space(domain: str, element: str, refinement: int = 1, alone: bool = False) -> LabelSpace:
    """``label_space("disk", "DG0")``; CG2 and CG3 on quadrilaterals and hexahedra are the spectral elements."""
    return _label_space(domain, element, refinement, alone)


def laplace(domain: str, element: str, rank: int, alone: bool = False) -> Basis:
    """Laplace eigenfunctions on ``label_space(domain, element)``."""
    return _laplace(domain, element, rank, alone)


# A cache of the functions above would tell laplace("disk", "CG1", 4) from laplace("disk", "CG1", rank=4).


@cache
def _mesh(domain, refinement, alone):
    return DOMAINS[domain](refinement, COMM_SELF if alone else COMM_WORLD)


@cache
def _label_space(domain, element, refinement, alone):
    return LabelSpace(fd.FunctionSpace(mesh(domain, refinement, alone), element[:-1], int(element[-1])))


@cache
def _laplace(domain, element, rank, alone):
    return laplace_basis(label_space(domain, element, alone=alone), rank)


@cache
def with_channels(domain: str, element: str, rank: int, alone: bool = False) -> Basis:
    """The same functions on ``label_space(domain, element)`` with two channels."""
    return laplace_basis(Channels(_laplace(domain, element, rank, alone).Y, 2), rank)


def smooth(Y: LabelSpace, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Values of smooth functions of the coordinates, shape (nodes, samples), of size one: no partition changes them."""
    rng = np.random.default_rng(seed)
    dimension = Y.coordinates.shape[1]
    frequencies, phases = rng.normal(scale=2.0, size=(dimension, samples)), rng.uniform(0, 6, samples)
    channel = np.repeat(np.arange(Y.channels), Y.nodes // Y.channels)[:, None]
    return np.cos(Y.coordinates @ frequencies + phases + channel)


def set_smooth(net, rng, size: float = 1.0) -> None:
    """Give bias and kernel of all layers values of that size which do not depend on the partition."""
    for k in range(max(len(net.kernel.functions), len(net.bias.functions))):
        if k < len(net.kernel.functions):
            shape = net.kernel.space_bases[k].shape
            net.kernel.set(k, size * rng.normal(size=shape) / shape[1] ** 0.5)
        if k < len(net.bias.functions):
            bias = net.bias.space_bases[k]
            if bias.space is net.Y.V:
                net.bias.set(k, size * smooth(net.Y, 1, seed=k)[:, 0])
            else:
                net.bias.set(k, size * rng.normal(size=bias.shape) / bias.shape[0] ** 0.5)


def flat_network(phi, psi=None, **options) -> ResidualNetwork:
    """A network from options in one flat list, as tests vary them: those of Kernel, Bias and Layers by names of their own."""
    given = {name: options.pop(name) for name in list(options) if name in _FLAT}

    def of(kind: str) -> dict:
        return {_FLAT[name][1]: value for name, value in given.items() if _FLAT[name][0] == kind}

    times = options.pop("times", None)
    layers = Layers(options.pop("layers", 8) if times is None else times, options.pop("final_time", None), **of("layers"))
    return ResidualNetwork(
        Kernel(phi, psi, **of("kernel")), bias=Bias(options.pop("bias", None), **of("bias")), layers=layers, **options
    )


#: What `flat_network` calls the parts of Kernel, Bias and Layers.
_FLAT = {
    "kernel_in_time": ("kernel", "in_time"), "learn_factors": ("kernel", "learn_factors"),
    "kernel_set": ("kernel", "among"),
    "bias_in_time": ("bias", "in_time"),
    "steps": ("layers", "steps"), "layers_per_block": ("layers", "per_block"), "learn_times": ("layers", "learn_times"),
}  # fmt: skip


def network(space=("disk", "CG1"), *, alone=False, size=1.0, basis_for_bias=False, **options) -> ResidualNetwork:
    """Three layers whose phi and psi differ in rank, psi not orthonormal, with parameters that no partition changes."""
    phi, psi = laplace(*space, rank=6, alone=alone), laplace(*space, rank=4, alone=alone)
    psi = Basis(psi.Y, psi.values @ np.diag([1.0, 2.0, 3.0, 4.0]) + psi.values[:, :1], "given")
    bias = laplace(*space, rank=5, alone=alone) if basis_for_bias else None
    net = flat_network(phi, psi, **{"times": TIMES, "activation": "tanh", "bias": bias} | options)
    set_smooth(net, np.random.default_rng(0), size)
    return net


def smooth_direction(net, rng, k: int, parameter):
    """A Function of a parameter's space with values that do not depend on the partition."""
    direction = fd.Function(parameter.space_basis.space)
    if direction.function_space() == net.Y.V:
        parameter.space_basis.write(direction, smooth(net.Y, 1, seed=100 + k)[:, 0])
    else:
        parameter.space_basis.write(direction, rng.normal(size=parameter.space_basis.shape))
    return direction


class HalfSquareDistance:
    """The operator f -> 1/2 sum_s int (f_s - target_s)^2 dy in the label measure."""

    output = None
    ready = True

    def __init__(self, Y: LabelSpace, target: fd.Function):
        self.Y = Y
        self.inputs = [BatchValues(Y, target.function_space())]
        self.target = Y.values(target).copy()

    def forward(self, arrays, save):
        return float(self.Y.sum(np.einsum("i,is->", self.Y.weights, (arrays[0] - self.target) ** 2))) / 2

    def adjoint(self, arrays, dual):
        return [dual * self.Y.weights[:, None] * (arrays[0] - self.target)]

    def tangent(self, arrays, directions):
        return float(self.Y.sum(np.sum(self.adjoint(arrays, 1.0)[0] * directions[0])))

    def second_adjoint(self, arrays, directions, dual, dual_dot):
        return [self.adjoint(arrays, dual_dot)[0] + dual * self.Y.weights[:, None] * directions[0]]


def half_square_distance(f: fd.Function, target: fd.Function, Y: LabelSpace):
    """J = 1/2 sum_s int (f_s - target_s)^2 dy as an AdjFloat, recorded if the tape is annotating."""
    return apply(HalfSquareDistance(Y, target), [f])[0]
