"""The doors of networks inside of other programs, of those that need neither PyTorch nor JAX; see `doors.py`.

Those of `external.torch` and `external.jax` stand in the tests that run where these are.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from doors import Door
from helpers import smooth
from problems import learning_problem, network

from fem_resnet.external import network_function, network_operator
from fem_resnet.external.network_function import NetworkFunction, check_head

#: Modules whose public names have doors here.
MODULES = (network_function, network_operator)


@cache
def function() -> NetworkFunction:
    """A network with a head onto three classes, as a function of arrays."""
    problem = learning_problem(network("disk", "CG1", bias="basis"))
    return NetworkFunction(problem.net, problem.head)


def point(seed: int = 1) -> list[np.ndarray]:
    """f_I of two samples, and all coefficients."""
    return [smooth(function().Y, 2, seed=seed), *(np.full(shape, 0.1 * seed) for shape in function().shapes)]


def functional() -> np.ndarray:
    return np.ones((function().outputs, 2))


def method(name: str, **arguments) -> Door:
    """A method of `NetworkFunction`; each rank has its own part of all arrays."""
    made = {"self": function, **arguments}
    return Door(
        getattr(NetworkFunction, name),
        lambda: {argument: make() for argument, make in made.items()},
        parted=tuple(arguments),
    )


DOORS = {
    "external.NetworkFunction": Door(
        NetworkFunction,
        lambda: {"net": function().net, "head": function().head},
        takes={"head": {"None"}},
        parted=("net", "head"),
    ),
    "external.NetworkFunction.value": method("value", arrays=point),
    "external.NetworkFunction.tangent": method("tangent", arrays=point, directions=lambda: point(2)),
    "external.NetworkFunction.adjoint": method("adjoint", arrays=point, functional=functional),
    "external.NetworkFunction.curvature": method(
        "curvature", arrays=point, functional=functional, directions=lambda: point(2)
    ),
    "external.NetworkFunction.give": method("give", coefficients=lambda: point()[1:]),
    "external.check_head": Door(
        check_head,
        lambda: {"head": function().head, "net": function().net},
        takes={"head": {"None"}},
        parted=("head", "net"),
    ),
}

#: Public names there that are not called with arguments from outside: what they are.
NO_DOORS = {
    "external.NetworkOperator": "what network_operator gives; it asks for what that puts in",
    "external.network_operator": "a name of the package, with a door of its own",
}
