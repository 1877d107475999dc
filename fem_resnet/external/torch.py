"""Networks in PyTorch: `Module` is a `torch.nn.Module`, with derivatives of every order that is asked for up to the second.

On several ranks a program runs on each of them, and a tensor is one of two kinds:

- **by nodes**: each rank has the entries of the nodes that it owns;
- **replicated**: all ranks have the same tensor, as coefficients in bases, scores of classes, a loss.

The derivative of a replicated loss in a tensor by nodes is by nodes, and in a replicated tensor it is replicated: each rank
has all of it, and nothing is to be added up over ranks. All calls here keep this law, given that the same is called in the
same order on all ranks. Where a program goes from one kind to the other, `sum_over_ranks` and `to_nodes` keep it. The loss of
a field is the sum over the ranks of what each has of it; the weights of a layer that acts on each node by itself are
replicated, and act on tensors by nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from fem_resnet.arguments import instance
from fem_resnet.external.network_function import NetworkFunction
from fem_resnet.learning.head import Head
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import same, together

__all__ = ["Module", "sum_over_ranks", "to_nodes"]


class Module(torch.nn.Module):
    """A network, and a head if there is one, as a module of PyTorch. Collective over the communicator of the label domain.

    Its parameters are the coefficients, float64 on the CPU, which start as those of network and head. These stay what they
    are until `give`. There are gradients of first and second order, `torch.func.jvp`, and the transforms of `torch.func`;
    `vmap` calls one after the other, so give many inputs as one batch.

    Optimisers of PyTorch see plain numbers and not the inner product of L2(Y): for steps that do not depend on the mesh take
    coefficients in orthonormal bases (`laplace_basis`), also for the bias.

    Parameters
    ----------
    net
        The network.
    head
        The head whose output is returned; if left out, f(T) is. Its prediction h is left to the loss: of classes these are
        the scores that `torch.nn.functional.cross_entropy` takes.

    Attributes
    ----------
    kernel_0, bias_0, W_0, .. : torch.nn.Parameter
        The coefficients by the names of parameters and their numbers in time, of the shapes of `Parameter.get`: values at
        nodes by nodes, all others replicated. Rank 0 speaks for the latter.

    Raises
    ------
    TypeError
        If an argument is no network, or no head.
    ValueError
        If the head reads states on another label domain.

    Examples
    --------
    >>> import torch
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import LabelSpace, ResidualNetwork, laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> phi = laplace_basis(Y, 3)
    >>> module = Module(ResidualNetwork(phi, bias=phi, layers=1))
    >>> [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    [('bias_0', (3,)), ('kernel_0', (3, 3))]
    >>> module(torch.ones(5, Y.nodes, dtype=torch.float64)).shape == (5, Y.nodes)
    True
    """

    def __init__(self, net: ResidualNetwork, head: Head | None = None):
        super().__init__()
        self._function = NetworkFunction(net, head)
        for name, coefficients in zip(self._function.names, self._function.take()):
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(coefficients)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f(T), or the output of the head, for initial states. Collective.

        Parameters
        ----------
        x
            f_I by nodes, shape (samples, nodes), float64, on the CPU: sample s is `Y.values(batch)[:, s]`.

        Returns
        -------
        torch.Tensor
            f(T) by nodes, shape (samples, nodes); O by nodes of the head's label domain; or scores, replicated, shape
            (samples, classes).

        Raises
        ------
        TypeError, ValueError
            If x is no such tensor, a value is not finite, or ranks have different numbers of samples; on all ranks alike.
        """
        Y = self._function.Y
        together(Y.comm, lambda: _check(x, Y.nodes))
        same(Y.comm, samples=len(x))
        return _Value.apply(self._function, x.T, *(getattr(self, name) for name in self._function.names)).T

    def give(self) -> None:
        """Assign the coefficients to the network and the head that the module was made of. Collective."""
        self._function.give([getattr(self, name).detach().numpy() for name in self._function.names])


def sum_over_ranks(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
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
        If `comm` is no communicator, or x no tensor.
    """
    return _Sum.apply(_tensor(x), instance("comm", comm, MPI.Comm))


def to_nodes(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    """A replicated tensor, to act on tensors by nodes: the same values; the derivative is the sum over the ranks. Collective.

    Parameters
    ----------
    x
        The tensor, the same on all ranks.
    comm
        The communicator, as `Y.comm`.

    Raises
    ------
    TypeError
        If `comm` is no communicator, or x no tensor.
    """
    return _ToNodes.apply(_tensor(x), instance("comm", comm, MPI.Comm))


def _tensor(x: Any) -> torch.Tensor:
    return instance("x", x, torch.Tensor)


def _check(x: Any, nodes: int) -> None:
    if _tensor(x).dtype != torch.float64 or x.device.type != "cpu":
        raise TypeError(f"x: expected a tensor of float64 on the CPU, got {x.dtype} on {x.device}; x.double().cpu() is one")
    if x.ndim != 2 or x.shape[1] != nodes or len(x) == 0:
        raise ValueError(f"x: expected shape (samples, nodes) = (at least 1, {nodes}), got {tuple(x.shape)}")


# -- sums and copies -------------------------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(x, comm):
        total = np.array(x.detach().numpy())
        comm.Allreduce(MPI.IN_PLACE, total)
        return torch.from_numpy(total)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.comm = inputs

    @staticmethod
    def backward(ctx, l):
        return _ToNodes.apply(l, ctx.comm), None

    @staticmethod
    def jvp(ctx, v, _):
        return _Sum.apply(v, ctx.comm)

    @staticmethod
    def vmap(info, in_dims, x, comm):
        return _Sum.apply(x, comm), in_dims[0]


class _ToNodes(torch.autograd.Function):
    @staticmethod
    def forward(x, comm):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.comm = inputs

    @staticmethod
    def backward(ctx, l):
        return _Sum.apply(l, ctx.comm), None

    @staticmethod
    def jvp(ctx, v, _):
        return v.clone()

    @staticmethod
    def vmap(info, in_dims, x, comm):
        return _ToNodes.apply(x, comm), in_dims[0]


# -- the network -----------------------------------------------------------------------------------------------------------
#
# Of the four functions of `NetworkFunction` each has derivatives that are among the four, but for the last one.


class _Value(torch.autograd.Function):
    """F(m), for tensors m = (f_I, coefficients)."""

    @staticmethod
    def forward(function, *m):
        return torch.from_numpy(function.value(_arrays(m)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *m = inputs
        ctx.save_for_backward(*m)
        ctx.save_for_forward(*m)

    @staticmethod
    def backward(ctx, l):
        return None, *_Adjoint.apply(ctx.function, l, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, _, *v):
        m = ctx.saved_tensors
        return _Tangent.apply(ctx.function, *m, *_directions(m, v))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_Value.apply, info, in_dims, inputs)


class _Tangent(torch.autograd.Function):
    """F'(m) v, of (m, v)."""

    @staticmethod
    def forward(function, *mv):
        return torch.from_numpy(function.tangent(*_halves(_arrays(mv))))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *mv = inputs
        ctx.save_for_backward(*mv)

    @staticmethod
    def backward(ctx, l):
        m, v = _halves(ctx.saved_tensors)
        return None, *_Curvature.apply(ctx.function, l, *m, *v), *_Adjoint.apply(ctx.function, l, *m)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_Tangent.apply, info, in_dims, inputs)


class _Adjoint(torch.autograd.Function):
    """F'(m)^T l, of (l, m)."""

    @staticmethod
    def forward(function, l, *m):
        return tuple(map(torch.from_numpy, function.adjoint(_arrays(m), *_arrays([l]))))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *lm = inputs
        ctx.save_for_backward(*lm)
        ctx.save_for_forward(*lm)

    @staticmethod
    def backward(ctx, *w):
        l, *m = ctx.saved_tensors
        by_l = _Tangent.apply(ctx.function, *m, *w) if ctx.needs_input_grad[1] else None
        by_m = _Curvature.apply(ctx.function, l, *m, *w) if any(ctx.needs_input_grad[2:]) else [None] * len(m)
        return None, by_l, *by_m

    @staticmethod
    def jvp(ctx, _, l_dot, *v):
        l, *m = ctx.saved_tensors
        parts = _Curvature.apply(ctx.function, l, *m, *_directions(m, v))
        if l_dot is None:
            return parts
        return tuple(map(torch.add, parts, _Adjoint.apply(ctx.function, l_dot, *m)))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_Adjoint.apply, info, in_dims, inputs)


class _Curvature(torch.autograd.Function):
    """(F''(m) v)^T l, of (l, m, v)."""

    @staticmethod
    def forward(function, l, *mv):
        m, v = _halves(_arrays(mv))
        return tuple(map(torch.from_numpy, function.curvature(m, *_arrays([l]), v)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("a network of fem_resnet has derivatives up to the second; a third one was asked for")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_Curvature.apply, info, in_dims, inputs)


def _arrays(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    return [np.ascontiguousarray(tensor.detach().numpy()) for tensor in tensors]


def _halves(parts: Sequence) -> tuple[Sequence, Sequence]:
    return parts[: len(parts) // 2], parts[len(parts) // 2 :]


def _directions(m: Sequence[torch.Tensor], v: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """One direction an input: 0 for an input that has none."""
    return [torch.zeros_like(part) if direction is None else direction for part, direction in zip(m, v)]


def _one_by_one(apply: Callable, info, in_dims: Sequence[int | None], inputs: Sequence) -> tuple:
    """The rule of `vmap`: call after call, and the results stacked."""
    results = [
        apply(*(x if dim is None else x.select(dim, k) for x, dim in zip(inputs, in_dims))) for k in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])
