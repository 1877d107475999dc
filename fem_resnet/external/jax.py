"""Networks in JAX: `Model` is a function of coefficients and inputs, with `jit`, `grad`, `jvp`, `vmap` and second derivatives.

On several ranks a program runs on each of them, and an array is by nodes or replicated, with the law of
`fem_resnet.external.torch`: the derivative of a replicated number in an array by nodes is by nodes, and in a replicated array
it is replicated. `sum_over_ranks` and `to_nodes` go from one kind to the other.

Each of the four functions of `NetworkFunction` is a primitive of JAX that calls back to Python. Inside of `jit` JAX may call
functions that do not depend on each other in any order, which may differ between ranks: on several ranks give the samples of
all calls as one batch, or leave `jit` out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import DynamicJaxprTracer
from mpi4py import MPI

from fem_resnet.arguments import instance
from fem_resnet.external.network_function import NetworkFunction
from fem_resnet.learning.head import Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same, together

__all__ = ["Model", "sum_over_ranks", "to_nodes"]


class Model:
    """A network, and a head if there is one, as a function in JAX. Collective over the communicator of the label domain.

    There are derivatives of first order, forward and reverse, and those of second order but forward over forward; `vmap` calls
    one after the other, so give many inputs as one batch. Numbers are float64.

    Parameters
    ----------
    net
        The network. It and the head stay what they are until `give`.
    head
        The head whose output is returned; if left out, f(T) is. Its prediction h is left to the loss.

    Raises
    ------
    TypeError
        If an argument is no network, or no head.
    ValueError
        If the head reads states on another label domain, or JAX has 32 bits a number.

    Examples
    --------
    >>> import jax
    >>> jax.config.update("jax_enable_x64", True)
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> phi = laplace_basis(Y, 3)
    >>> model = Model(ResidualNetwork(phi, bias=phi, layers=1))
    >>> coefficients = model.coefficients()
    >>> {name: array.shape for name, array in coefficients.items()}
    {'bias_0': (3,), 'kernel_0': (3, 3)}
    >>> model(coefficients, jax.numpy.ones((5, Y.nodes))).shape == (5, Y.nodes)
    True
    """

    def __init__(self, net: ResidualNetwork, head: Head | None = None):
        self._function = NetworkFunction(net, head)
        if jnp.zeros(0).dtype != jnp.float64:
            raise ValueError(
                'jax: expected 64 bits a number, got 32; call jax.config.update("jax_enable_x64", True) first of all'
            )

    def coefficients(self) -> dict[str, jax.Array]:
        """The coefficients that network and head have now, of the shapes of `Parameter.get`. Collective.

        Values at nodes are by nodes, all others replicated; rank 0 speaks for these.
        """
        return dict(zip(self._function.names, map(jnp.asarray, self._function.take())))

    def __call__(self, coefficients: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        """f(T), or the output of the head, for initial states. Collective where it is computed.

        Parameters
        ----------
        coefficients
            As `coefficients` gives them, each of its shape there.
        x
            f_I by nodes, shape (samples, nodes), float64: sample s is `Y.values(batch)[:, s]`.

        Returns
        -------
        jax.Array
            f(T) by nodes, shape (samples, nodes); O by nodes of the head's label domain; or scores, replicated, shape
            (samples, classes).

        Raises
        ------
        TypeError, ValueError
            If coefficients or x are of another kind or shape, or ranks have different numbers of samples; on all ranks alike.
        """
        comm, nodes = self._function.Y.comm, self._function.Y.nodes
        m = together(comm, lambda: [_checked("x", x, ("samples", nodes)).T, *self._in_order(coefficients)])
        same(comm, samples=m[0].shape[1])
        return _value.bind(*m, function=self._function).T

    def give(self, coefficients: Mapping[str, jax.Array]) -> None:
        """Assign coefficients to the network and the head that the model was made of. Collective.

        Parameters
        ----------
        coefficients
            As `coefficients` gives them, each of its shape there.

        Raises
        ------
        TypeError, ValueError
            If they are of another kind or shape; on all ranks alike.
        """
        given = together(self._function.Y.comm, lambda: self._in_order(coefficients))
        self._function.give([np.array(array) for array in given])

    def _in_order(self, coefficients: Mapping[str, jax.Array]) -> list[jax.Array]:
        names = self._function.names
        if set(instance("coefficients", coefficients, Mapping)) != set(names):
            raise ValueError(f"coefficients: expected the names {', '.join(names)}, got {', '.join(map(str, coefficients))}")
        return [_checked(name, coefficients[name], shape) for name, shape in zip(names, self._function.shapes)]


def sum_over_ranks(x: jax.Array, comm: MPI.Comm) -> jax.Array:
    """The sum over the ranks of what each of them has, replicated. Collective; can be differentiated as often as one likes.

    Parameters
    ----------
    x
        What this rank has; its shape is the same on all ranks.
    comm
        The communicator, as `Y.comm`.

    Raises
    ------
    TypeError
        If `comm` is no communicator, or x no array of real numbers.
    """
    return _sum.bind(_array("x", x), ranks=_Ranks(comm))


def to_nodes(x: jax.Array, comm: MPI.Comm) -> jax.Array:
    """A replicated array, to act on arrays by nodes: the same values, whose derivative is the sum over the ranks. Collective.

    Parameters
    ----------
    x
        The array, the same on all ranks.
    comm
        The communicator, as `Y.comm`.

    Raises
    ------
    TypeError
        If `comm` is no communicator, or x no array of real numbers.
    """
    return _to_nodes.bind(_array("x", x), ranks=_Ranks(comm))


def _array(name: str, value: Any) -> jax.Array:
    try:
        array = jnp.asarray(value)
    except Exception as error:  # whatever JAX raises of what is no array
        raise TypeError(f"{name}: expected an array of JAX or of NumPy, got {type(value).__name__}: {error}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected real numbers, got {array.dtype}")
    return array


def _checked(name: str, value: Any, shape: tuple[int | str, ...]) -> jax.Array:
    array = _array(name, value)
    if array.dtype != jnp.float64:
        raise TypeError(f"{name}: expected float64, got {array.dtype}")
    if array.ndim != len(shape) or not all(n == given or isinstance(n, str) and given for n, given in zip(shape, array.shape)):
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, shape))}), got {array.shape}")
    return array


class _Ranks:
    """A communicator that has a hash, as parameters of primitives must."""

    def __init__(self, comm: MPI.Comm):
        self._comm = instance("comm", comm, MPI.Comm)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ranks) and self._comm == other._comm

    def __hash__(self) -> int:
        return hash(self._comm.handle)

    def sum(self, x: np.ndarray) -> np.ndarray:
        total = np.array(x)
        self._comm.Allreduce(MPI.IN_PLACE, total)
        return total


# -- primitives ------------------------------------------------------------------------------------------------------------


def _primitive(name: str, compute: Callable[..., Any], shapes: Callable[..., Any], several: bool = False) -> Primitive:
    """A primitive whose value Python computes from arrays of NumPy.

    `shapes` gives the shapes of its results from those of its arguments.
    """
    primitive = Primitive(f"fem_resnet_{name}")
    primitive.multiple_results = several

    def results(arguments, parameters, make):
        found = shapes(*(x.shape for x in arguments), **parameters)
        return [make(shape, jnp.float64) for shape in found] if several else make(found, jnp.float64)

    def run(*arguments, **parameters):
        return compute(*(np.ascontiguousarray(x) for x in arguments), **parameters)

    def now(*arguments, **parameters):
        # Outside of `jit` Python calls Python: a callback would be compiled anew at each call.
        found = run(*arguments, **parameters)
        return list(map(jnp.asarray, found)) if several else jnp.asarray(found)

    def later(*arguments, **parameters):
        shapes = results(arguments, parameters, jax.ShapeDtypeStruct)
        return jax.pure_callback(partial(run, **parameters), shapes, *arguments)

    def batched(arguments, dims, **parameters):
        front = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arguments, dims)]
        mapped = [x for x, dim in zip(front, dims) if dim is not None]

        def one(rest):
            rest = iter(rest)
            return primitive.bind(*(x if dim is None else next(rest) for x, dim in zip(front, dims)), **parameters)

        if any(isinstance(x, DynamicJaxprTracer) for x in mapped):
            found = jax.lax.map(one, mapped)  # in `jit`, where it keeps the order of the calls
        else:
            found = jax.tree.map(lambda *each: jnp.stack(each), *map(one, zip(*mapped)))
        return found, [0] * len(found) if several else 0

    primitive.def_impl(now)
    primitive.def_abstract_eval(lambda *arguments, **parameters: results(arguments, parameters, jax.core.ShapedArray))
    mlir.register_lowering(primitive, mlir.lower_fun(later, multiple_results=several))
    batching.primitive_batchers.__setitem__(primitive, batched)  # by name, as the mock of the documentation has no brackets
    return primitive


def _halves(parts: Sequence) -> tuple[Sequence, Sequence]:
    return parts[: len(parts) // 2], parts[len(parts) // 2 :]


def _refuse(what: str, *_, **__):
    raise NotImplementedError(f"a network of fem_resnet has no {what} in JAX; take second ones by grad or jvp over grad")


def _output(m, function: NetworkFunction) -> tuple[int, int]:
    return function.outputs, m[0][1]


_value = _primitive("value", lambda *m, function: function.value(m), lambda *m, function: _output(m, function))
_tangent = _primitive(
    "tangent",
    lambda *mv, function: function.tangent(*_halves(mv)),
    lambda *mv, function: _output(mv, function),
)
_adjoint = _primitive("adjoint", lambda l, *m, function: function.adjoint(m, l), lambda l, *m, function: m, several=True)
_curvature = _primitive(
    "curvature",
    lambda l, *mv, function: function.curvature(_halves(mv)[0], l, _halves(mv)[1]),
    lambda l, *mv, function: _halves(mv)[0],
    several=True,
)
# F''(m)[v, w], of (m, v, w): there is no way to compute it, but its transposes are curvatures.
_second_tangent = _primitive(
    "second_tangent",
    partial(_refuse, "derivative forward over forward"),
    lambda *mvw, function: _output(mvw, function),
)
_sum = _primitive("sum_over_ranks", lambda x, ranks: ranks.sum(x), lambda x, ranks: x)
_to_nodes = _primitive("to_nodes", lambda x, ranks: x, lambda x, ranks: x)
ad.deflinear2(_sum, lambda l, x, ranks: [_to_nodes.bind(l, ranks=ranks)])
ad.deflinear2(_to_nodes, lambda l, x, ranks: [_sum.bind(l, ranks=ranks)])


# -- derivatives -----------------------------------------------------------------------------------------------------------


def _moves(tangents: Sequence) -> bool:
    return any(type(tangent) is not ad.Zero for tangent in tangents)


def _filled(parts: Sequence) -> list:
    return [ad.instantiate_zeros(part) for part in parts]


def _added(terms: Sequence):
    """The sum of one or two terms, each an array or a list of them. JAX asks where something moves, so there is one."""
    return terms[0] if len(terms) == 1 else jax.tree.map(jnp.add, *terms)


def _value_jvp(m, v, function):
    return _value.bind(*m, function=function), _tangent.bind(*m, *_filled(v), function=function)


def _tangent_jvp(mv, mv_dot, function):
    (m, v), (m_dot, v_dot) = _halves(mv), _halves(mv_dot)
    out, terms = _tangent.bind(*mv, function=function), []
    if _moves(v_dot):
        terms.append(_tangent.bind(*m, *_filled(v_dot), function=function))
    if _moves(m_dot):
        terms.append(_second_tangent.bind(*m, *v, *_filled(m_dot), function=function))
    return out, _added(terms)


def _adjoint_jvp(lm, lm_dot, function):
    (l, *m), (l_dot, *m_dot) = lm, lm_dot
    out, terms = _adjoint.bind(*lm, function=function), []
    if _moves([l_dot]):
        terms.append(_adjoint.bind(l_dot, *m, function=function))
    if _moves(m_dot):
        terms.append(_curvature.bind(l, *m, *_filled(m_dot), function=function))
    return out, _added(terms)


def _curvature_jvp(lmv, lmv_dot, function):
    (l, *mv), (l_dot, *mv_dot) = lmv, lmv_dot
    (m, v), (m_dot, v_dot) = _halves(mv), _halves(mv_dot)
    if _moves(m_dot):
        _refuse("third derivative")
    out, terms = _curvature.bind(*lmv, function=function), []
    if _moves([l_dot]):
        terms.append(_curvature.bind(l_dot, *m, *v, function=function))
    if _moves(v_dot):
        terms.append(_curvature.bind(l, *m, *_filled(v_dot), function=function))
    return out, _added(terms)


def _only_where_asked(parts: Sequence, arguments: Sequence) -> list:
    return [part if ad.is_undefined_primal(x) else None for part, x in zip(parts, arguments)]


def _tangent_transpose(l, *mv, function):
    m, v = _halves(mv)
    return [None] * len(m) + _only_where_asked(_adjoint.bind(_filled([l])[0], *m, function=function), v)


def _second_tangent_transpose(l, *mvw, function):
    count = len(mvw) // 3
    m, v, w = mvw[:count], mvw[count : 2 * count], mvw[2 * count :]
    given = w if any(map(ad.is_undefined_primal, v)) else v
    functionals = _curvature.bind(_filled([l])[0], *m, *given, function=function)
    return [None] * count + _only_where_asked(functionals, v) + _only_where_asked(functionals, w)


def _adjoint_transpose(w, l, *m, function):
    return [_tangent.bind(*m, *_filled(w), function=function)] + [None] * len(m)


def _curvature_transpose(w, l, *mv, function):
    m, v = _halves(mv)
    if ad.is_undefined_primal(l):
        return [_second_tangent.bind(*m, *v, *_filled(w), function=function)] + [None] * len(mv)
    return [None] * (1 + len(m)) + _only_where_asked(_curvature.bind(l, *m, *_filled(w), function=function), v)


ad.primitive_jvps.update(
    {
        _value: _value_jvp,
        _tangent: _tangent_jvp,
        _adjoint: _adjoint_jvp,
        _curvature: _curvature_jvp,
        _second_tangent: partial(_refuse, "third derivative"),
    }
)
ad.primitive_transposes.update(
    {
        _tangent: _tangent_transpose,
        _adjoint: _adjoint_transpose,
        _curvature: _curvature_transpose,
        _second_tangent: _second_tangent_transpose,
    }
)
