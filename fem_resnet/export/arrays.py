"""A network, its head and its lift as named arrays, from which `predict` computes what they do.

The state is that at all nodes, in the order of `node_numbers`, one channel after the other. Names of arrays:

- ``coordinates``, ``weights``: of the nodes of one channel, shape (nodes, dimension); of those of all channels, M.
- ``basis_0``, ..: values of bases at the nodes, shape (nodes, rank); of one channel for a basis that each channel repeats.
- ``beta_0``, ..: coefficients of the kernel, one for each function in time; ``beta_bases`` numbers their phi and psi, and
  ``beta_in_time[step, stage, k]`` is the value of the function k in time there. ``a_..``: the same of the bias, where basis -1
  stands for values at the nodes.
- ``times``, ``steps``: layer times, and steps a layer; ``A``, ``b``: the explicit Runge-Kutta method, without stages that
  nothing uses; ``gradient_flow``.
- ``sigma``: the activation as JSON: formulas in s (`expression_tree`) and the cuts between them.
- of a lift ``V``; of a head ``W``, ``mu``, ``head_psi``, ``head_onto`` (numbers of bases), ``prediction``,
  ``output_coordinates`` and ``output_weights``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import sympy

from fem_resnet.activation.activation import Activation
from fem_resnet.activation.expression_tree import to_tree
from fem_resnet.activation.formulas import parts
from fem_resnet.export.predict import FORMAT
from fem_resnet.label_domain.basis import Basis, node_numbers
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.layers.inputs import LayerUse
from fem_resnet.learning.head import Head
from fem_resnet.learning.lift import Lift
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.parameters.parameter import Parameter
from fem_resnet.parameters.space_basis import BasisCoefficients

__all__ = ["network_arrays", "sigma_formulas"]

_LOGISTIC_OF = ["Mul", 0.5, ["Add", 1.0, ["tanh", ["Mul", 0.5, "s"]]]]
#: Formulas of the built-in activations, and the cuts between them: derivatives do not overflow either.
_BUILT_IN = {
    "tanh": ([["tanh", "s"]], []),
    "arctan": ([["atan", "s"]], []),
    "sigmoid": ([_LOGISTIC_OF], []),
    "softplus": (
        [["log", ["Add", 1.0, ["exp", "s"]]], ["Add", "s", ["log", ["Add", 1.0, ["exp", ["Mul", -1.0, "s"]]]]]],
        [0.0],
    ),
    "relu": ([["Mul", 0.0, "s"], "s"], [0.0]),
    "leaky_relu": ([["Mul", 0.1, "s"], "s"], [0.0]),
    "identity": (["s"], []),
}  # fmt: skip


def sigma_formulas(activation: Activation) -> tuple[list, list[float]]:
    """The formulas of an activation as trees, from left to right, and the cuts between them.

    Raises
    ------
    ValueError
        If it has kernels of its own, or functions that `to_tree` does not know.

    Examples
    --------
    >>> from fem_resnet import get_activation
    >>> sigma_formulas(get_activation("leaky_relu"))
    ([['Mul', 0.1, 's'], 's'], [0.0])
    """
    if not activation.is_described:
        raise ValueError(
            f"net: expected an activation with formulas, {activation.name} has kernels of its own; give a SymPy expression"
        )
    if activation.expression is None:
        if activation.name == "elu":
            alpha = dict(activation.parameters)["alpha"]
            return [["Mul", alpha, ["Add", ["exp", "s"], -1.0]], "s"], [0.0]
        return _BUILT_IN[activation.name]  # type: ignore[return-value]  # lists, the second of numbers
    found = parts(activation.expression, 0)
    return [_numbers(part.formula) for part in found], [part.right for part in found[:-1]]


def _numbers(formula: sympy.Expr) -> str | list:
    """A formula as a tree, with floats for all numbers."""
    if not formula.free_symbols:
        return ["Add", float(formula), ["Mul", 0.0, "s"]]  # of the shape of s

    def converted(tree):
        if isinstance(tree, list):
            if tree[0] == "Rational":
                return tree[1] / tree[2]
            return [tree[0], *map(converted, tree[1:])]
        return {"pi": float(np.pi), "E": float(np.e)}.get(tree, tree) if isinstance(tree, str) else float(tree)

    return converted(to_tree(formula))


def network_arrays(net: ResidualNetwork, head: Head | None, lift: Lift | None) -> dict[str, np.ndarray]:
    """The arrays, the same on every rank. Collective.

    Parameters
    ----------
    net, head, lift
        What is exported; head and lift on the network's label domain.

    Raises
    ------
    ValueError
        If the method is not explicit or the activation has no formulas.
    """
    Y, tableau = net.Y, net.explicit_tableau()
    A, b, c = tableau
    layers = net.layer_inputs()
    bases = _Bases(Y)
    arrays: dict[str, np.ndarray | str | int | bool] = {
        "format": FORMAT,
        "coordinates": _everywhere(Y.one, Y.one.coordinates),
        "weights": _everywhere(Y, Y.weights[:, None])[:, 0],
        "times": net.times, "steps": net.steps, "A": A, "b": b, "gradient_flow": net.gradient_flow,
        "sigma": json.dumps(sigma_formulas(net.activation)),
    }  # fmt: skip
    given = [(layer.factors.phi, layer.factors.psi) for layer in layers]
    for name, parameter in (("beta", net.kernel), ("a", net.bias)):
        in_time, at = _in_time(net, parameter, c)
        arrays[f"{name}_in_time"] = in_time
        numbers = []
        for k, basis in enumerate(parameter.space_bases):
            c_k = parameter.read(k)
            if name == "beta":
                numbers.append([bases.number(each) for each in given[at[k]]])
            elif isinstance(basis, BasisCoefficients):
                numbers.append([bases.number(basis.basis)])
            else:
                numbers.append([-1])
                c_k = _everywhere(Y, c_k[:, None])[:, 0]
            arrays[f"{name}_{k}"] = c_k
        arrays[f"{name}_bases"] = np.array(numbers, dtype=int).reshape(-1, 2 if name == "beta" else 1)
    if lift is not None:
        arrays["V"] = lift.matrix()
    if head is not None:
        W, mu = head.matrices()
        arrays |= {
            "W": W, "mu": mu, "head_psi": bases.number(head.psi), "head_onto": bases.number(head.onto),
            "prediction": head.prediction.name,
            "output_coordinates": _everywhere(head.Y.one, head.Y.one.coordinates),
            "output_weights": _everywhere(head.Y, head.Y.weights[:, None])[:, 0],
        }  # fmt: skip
    return {name: np.array(array) for name, array in (*arrays.items(), *bases.arrays())}


def _in_time(net: ResidualNetwork, parameter: Parameter, c: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """The values of a parameter's functions in time at all stages; for each function the first layer where it is active."""
    values = np.zeros((net.layers, net.steps, len(c), len(parameter.functions)))
    first: dict[int, int] = {}
    for layer in range(net.layers):
        use = LayerUse(parameter, layer)
        for k in use.active:
            first.setdefault(k, layer)
        for step in range(net.steps):
            for i, node in enumerate(c):
                values[layer, step, i, list(use.active)] = use.weights((step + node) / net.steps)
    return values.reshape(net.layers * net.steps, *values.shape[2:]), first


class _Bases:
    """Bases, each once, with their numbers."""

    def __init__(self, Y: LabelSpace):
        self._Y = Y
        self._bases: list[Basis] = []

    def number(self, basis: Basis) -> int:
        """The number of a basis."""
        if basis not in self._bases:
            self._bases.append(basis)
        return self._bases.index(basis)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The values of each, by its name. Collective."""
        for k, basis in enumerate(self._bases):
            yield f"basis_{k}", _everywhere(basis.one.Y, basis.one.values)


def _everywhere(Y: LabelSpace, values: np.ndarray) -> np.ndarray:
    """Values at all nodes in the order of `node_numbers`, shape (N, any), from those at the owned nodes. Collective."""
    everywhere = np.zeros((Y.size, values.shape[1]))
    everywhere[node_numbers(Y)] = values
    return Y.sum(everywhere)
