"""How far a network is from its limits: infinite depth, Theorem 2.1, and infinite width, Theorem 2.2.

In depth, the coefficients a(t), b(t) are kept and the steps become short: (2.1), or any other scheme, tends to (2.3). In
width, a(y, t), b(y, z, t) and f_I(y) are kept and the mesh of Y becomes fine: (2.7) tends to (2.8). The theorem as it is
printed says so in the sense of distributions. The convergence is strong in L2(Y) where sigma is Lipschitz, since
u = a - B f then converges strongly with a_h and b_h.

Both theorems suppose that the coefficients of the networks in a sequence converge almost everywhere and have a common
bound, (A2) and (A3) of 2.1, and that sigma is continuous and grows at most linearly, (A1) of 2.1 with abs(s). All built-in
activations do, with C1 = abs(sigma(0)) and C2 = `Activation.properties.lipschitz`. Where the coefficients do not converge,
the limit may be another one than expected, or there may be none (`demos/limits.py`). Networks of several sizes that are
trained separately are no such sequence.

Between the layer times z^tau continues by interpolation of the coefficients, (2.2), and Theorem 2.1 is about the supremum over
all t. `depth_limit` measures distances at the layer times, where z^tau is z_l, and with `between` at times inside of the steps
and at their ends from the left too (`DepthInterpolant`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import firedrake as fd
import numpy as np
from pyadjoint.tape import stop_annotating

from fem_resnet.arguments import function, instance, integer
from fem_resnet.costate.costate import solve_costate
from fem_resnet.costate.trajectory import Trajectory, solve_trajectory
from fem_resnet.features import HELD, STEPPED, supports
from fem_resnet.label_domain.basis import Basis
from fem_resnet.label_domain.label_space import LabelSpace
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.ranks import together
from fem_resnet.theory.limits.interpolant import DepthInterpolant
from fem_resnet.theory.limits.residual_network import refuse_other_schemes

__all__ = ["Convergence", "depth_limit", "width_limit"]


@dataclass(frozen=True)
class Convergence:
    """Errors for a falling sequence of sizes.

    Attributes
    ----------
    sizes : numpy.ndarray
        The longest step tau, in the unit of t, or the mesh size h, in the unit of length; shape (n,).
    errors : numpy.ndarray
        The errors, in the unit of f, shape (n,).
    """

    sizes: np.ndarray
    errors: np.ndarray

    @property
    def orders(self) -> np.ndarray:
        """The orders of convergence from one size to the next, shape (n - 1,); no unit."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.diff(np.log(self.errors)) / np.diff(np.log(self.sizes))

    def __str__(self) -> str:
        orders = ["", *(f"{order:.2f}" for order in self.orders)]
        rows = [f"{size:12.4g}{error:14.3e}{order:>8s}" for size, error, order in zip(self.sizes, self.errors, orders)]
        return "\n".join([f"{'size':>12s}{'error':>14s}{'order':>8s}", *rows])


@supports("channels", *HELD, "discrete_gradient", "single_precision")
def depth_limit(
    net: ResidualNetwork,
    initial: fd.Function,
    *,
    halvings: int = 3,
    between: int | None = None,
    solver_parameters: dict | None = None,
) -> Convergence:
    """Compare a network, with its own steps and with shorter ones, with the ODE (2.3) of the same coefficients: Theorem 2.1.

    The first error is the error of the network itself, how far it is from the ODE that its layers discretise.
    (`costate_check` compares co-states and gradients of a learning problem in the same way.) The other errors show the
    order of convergence. It is the order of the scheme if no coefficient jumps inside of a layer, and the coefficients of
    a network do not. Distances are measured at the layer times, where z^tau of (2.2) is z_l; or, with `between`, over all
    of [0, T]. The coefficients of a network are bounded, (A2) of 2.1; that sigma satisfies (A1) of 2.1 is supposed.
    Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        A network with fixed steps.
    initial
        f_I, a Function of `Y.V` or a batch.
    halvings
        How often the steps are halved, at least 0.
    between
        For a network with Euler's method: at how many times inside of each step, equally far apart, z^tau is compared too, at
        least 0, beside both ends of the step; z^tau jumps at an end, and both values count. None compares states at the layer
        times alone.
    solver_parameters
        PETSc options for (2.3), over `fem_resnet.time_stepping.evolution.SOLVER_PARAMETERS`. It is solved with steps of an
        eighth of the shortest ones.

    Returns
    -------
    Convergence
        The largest distance in L2(Y) at the times that are compared, of all samples together.

    Raises
    ------
    ValueError
        If an argument does not fit, the network adapts its steps, or it has no layers; with `between` if it has another scheme
        than Euler's.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import laplace_basis
    >>> Y = LabelSpace(FunctionSpace(UnitDiskMesh(2), "CG", 1))
    >>> net = ResidualNetwork(laplace_basis(Y, 6), layers=4, solver_parameters={"ts_rk_type": "1fe"})
    >>> net.kernel.set(0, np.eye(6))
    >>> depth_limit(net, Y.batch(Y.coordinates)).orders.round()
    array([1., 1., 1.])
    """
    halvings = integer("halvings", halvings, least=0)
    if between is not None:
        between = integer("between", between, least=0)
        refuse_other_schemes(net.solver_parameters)
    counts = net.steps * 2 ** np.arange(halvings + 1)
    with stop_annotating():
        exact = solve_trajectory(net, initial, steps=int(8 * counts[-1]), solver_parameters=solver_parameters)
        at_layers = [exact(t) for t in net.times]
        errors = []
        for steps in counts:
            other = net.replace(layers=replace(net.settings.layers, steps=int(steps)))
            pairs = _compared(other, initial, between, at_layers, exact)
            errors.append(max(net.Y.norm(fd.Function(f).assign(f - g)) for f, g in pairs))
    return Convergence(np.diff(net.times).max() / counts, np.array(errors))


def _compared(
    net: ResidualNetwork, initial: fd.Function, between: int | None, at_layers: list[fd.Function], exact: Trajectory
) -> Iterator[tuple[fd.Function, fd.Function]]:
    """Pairs of states of the network and of the ODE."""
    if between is None:
        yield from zip(net.run(initial).states(), at_layers)
        return
    z, T = DepthInterpolant(net, initial), net.times[-1]
    for theta in np.linspace(0, 1, between + 2):
        yield from ((f, exact(min(t, T))) for t, f in z.at_fraction(theta))


@supports(
    "channels",
    "no_layers", "gradient_flow", "learned_times", "kernel_set", "bases_by_layer", "linear_in_time", "shared_in_time",
    *STEPPED,
)  # fmt: skip
def width_limit(
    net: ResidualNetwork,
    initial: Callable[[np.ndarray], np.ndarray],
    spaces: Sequence[LabelSpace],
    *,
    terminal: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Convergence:
    """Compare a network on finer and finer label spaces of the same Y with the network on the finest one: Theorem 2.2.

    The bases of the network are moved to each space (`ResidualNetwork.on`), so that the kernels (2.7) converge and have a
    common bound, (A3) of 2.1. Collective over the ranks of the label domain.

    Parameters
    ----------
    net
        A network whose bias and kernel have bases that can be moved to another mesh, such as `laplace_basis`.
    initial
        f_I as a function of coordinates, from arrays of shape (nodes, geometric dimension) to (nodes,) or (nodes, samples).
    spaces
        At least two label spaces, from coarse to fine.
    terminal
        r(T) as a function of coordinates, with arrays of the same shapes and as many samples as f_I. If it is given,
        r(0) of (4.2) is compared instead of f(T).

    Returns
    -------
    Convergence
        Distances of f(T), or r(0), as distributions: distances of their inner products with the functions phi. For
        orthonormal phi that is the distance in L2(Y) of the projections onto their span. All samples are taken together.
        There is one error less than spaces.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, fewer than two spaces are given, they do not become finer, or the network is tied to
        its mesh.

    Examples
    --------
    >>> from firedrake import FunctionSpace, UnitDiskMesh
    >>> from fem_resnet import laplace_basis
    >>> spaces = [LabelSpace(FunctionSpace(UnitDiskMesh(n), "DG", 0)) for n in (2, 3, 4)]
    >>> phi = laplace_basis(spaces[-1], 6)
    >>> net = ResidualNetwork(phi, bias=phi, layers=1)
    >>> net.kernel.set(0, np.eye(6))
    >>> found = width_limit(net, lambda y: np.cos(y[:, 0]), spaces)
    >>> bool(1.5 < found.orders[0] < 2.7)
    True
    """
    function("initial", initial, "a function of coordinates")
    if terminal is not None:
        function("terminal", terminal, "a function of coordinates")
    for Y in instance("spaces", spaces, Sequence):
        instance("spaces", Y, LabelSpace)
    if len(spaces) < 2:
        raise ValueError(f"spaces: expected at least two LabelSpaces, got {spaces!r}")
    sizes = np.array([(Y.measure / Y.size) ** (1 / Y.V.mesh().topological_dimension) for Y in spaces])
    if not (np.diff(sizes) < 0).all():
        raise ValueError(f"spaces: expected falling mesh sizes, from coarse to fine, got mean sizes {sizes.tolist()}")
    with stop_annotating():
        moments = []
        for Y in spaces:
            moved = net.on(Y)
            x = Y.coordinates
            f = Y.batch(together(Y.comm, lambda: initial(x)), "initial")
            if terminal is None:
                compared = moved(f)
            else:
                r = Y.batch(together(Y.comm, lambda: terminal(x)), "terminal")
                compared = solve_costate(solve_trajectory(moved, f), r).at_layer(0)
            phi: Basis = moved.bases["phi"][-1]
            moments.append(phi.project(Y.values(compared)))
    errors = [float(np.linalg.norm(moment - moments[-1])) for moment in moments[:-1]]
    return Convergence(sizes[:-1], np.array(errors))
