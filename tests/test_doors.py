"""Every argument of a user is right, or refused by its name: all doors against all kinds of wrong arguments."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import firedrake as fd
import numpy as np
import pytest
import scipy.sparse
from checkpoint_schedules import NoneCheckpointSchedule
from firedrake import COMM_SELF, COMM_WORLD
from helpers import flat_network, label_space, laplace, mesh, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import learning_problem, network, taping

from fem_resnet import (
    Basis,
    Batch,
    Box,
    DampedAntisymmetric,
    Derivatives,
    Ellipse,
    Head,
    Kernel,
    KernelSampling,
    LabelSpace,
    LearningProblem,
    LocalFeedback,
    Loss,
    LowRankKernel,
    NormBounded,
    Pair,
    Points,
    Polygon,
    PositiveSemidefinite,
    ProximalStep,
    ResidualNetwork,
    RowBall,
    RowBox,
    RunningCost,
    Sections,
    SpanBox,
    StateGrid,
    autonomous_problem,
    circle_radius,
    class_space,
    closed_loop,
    compress,
    cross_entropy,
    depth_limit,
    enable_checkpointing,
    feedback_speeds,
    find_equilibria,
    find_steady_states,
    fit_growth,
    from_network,
    get_activation,
    given_basis,
    hessian_spectrum,
    integrated_norms,
    laplace_basis,
    least_squares,
    msa,
    picard,
    pmp_residual,
    point_space,
    save,
    singular_system,
    smooth_in_space,
    smooth_in_time,
    solve_costate,
    solve_linearised,
    solve_trajectory,
    solve_value_function,
    tikhonov,
    train,
    train_pam,
)  # fmt: skip
from fem_resnet.arguments import choice, integer, number, real_array
from fem_resnet.tape.checkpoints import schedule_of
from fem_resnet.theory.energy.growth import GrowthMonitor

on_two_ranks = pytest.mark.parallel([1, 2])
on_ranks = pytest.mark.parallel([1, 2, 3])


# -- what the doors are asked with -------------------------------------------------------------------------------------


@cache
def parts():
    """A problem of three layers with a head on a disk, and a kernel of phi and psi of different ranks."""
    problem = learning_problem(network("disk", "CG1"))
    return problem, problem.net, problem.net.Y


@cache
def cells():
    """Six cells, on all ranks."""
    return LabelSpace(fd.FunctionSpace(fd.UnitIntervalMesh(6), "DG", 0))


@cache
def value_function():
    Y = class_space(1, COMM_SELF)
    return solve_value_function(Y, Box((-1, 1), (0, 0)), "identity", [2.0], StateGrid([[0.0, 0.5]], 0.25), final_time=1.0)


@cache
def stable():
    return ResidualNetwork(Kernel(laplace("disk", "CG1", 4), among=PositiveSemidefinite()), layers=1)


def weights_in_a_problem(weights):
    problem, net, _ = parts()
    return LearningProblem(net, problem.head, cross_entropy, None, Batch(problem.batch.inputs, problem.batch.targets, weights))


@cache
def trajectory():
    problem, net, _ = parts()
    return solve_trajectory(net, problem.batch.inputs), problem.batch.inputs


@dataclass(frozen=True)
class Door:
    """A function of one array, the name of the array in messages, and an array that it takes."""

    argument: str
    call: Callable
    good: Callable[[], np.ndarray]
    #: Kinds of `BAD` that are not wrong here.
    takes: tuple[str, ...] = ()
    #: Whether each rank has a part of it.
    in_parts: bool = False


def nodal(*shape):
    return lambda: np.ones((parts()[2].nodes, *shape))


def plain(*shape):
    return lambda: np.arange(1.0, 1.0 + np.prod(shape)).reshape(shape)


ANY_SHAPE = ("another shape", "empty")

DOORS = {
    "Y.batch": Door("pictures", lambda x: parts()[2].batch(x, "pictures"), nodal(2), in_parts=True),
    "Basis, values": Door("(values|functions)", lambda x: Basis(parts()[2], x, "given"), nodal(1), in_parts=True),
    "Basis, eigenvalues": Door(
        "eigenvalues", lambda x: Basis(parts()[2], np.ones((parts()[2].nodes, 1)), "given", x), plain(1)
    ),
    "Basis.function": Door("coefficients", lambda x: laplace("disk", "CG1", 4).function(x), plain(4)),
    "kernel.set": Door("coefficients of kernel_0", lambda x: parts()[1].kernel.set(0, x), plain(4, 3)),
    "bias.set": Door("coefficients of bias_0", lambda x: parts()[1].bias.set(0, x), nodal(), in_parts=True),
    "W.set": Door("coefficients of W_0", lambda x: parts()[0].head.W.set(0, x), plain(3, 4)),
    "stable kernel.set": Door("coefficients of kernel_0", lambda x: stable().kernel.set(0, x), lambda: np.eye(4)),
    "times": Door(
        "layers.times", lambda x: ResidualNetwork(laplace("disk", "CG1", 4), layers=x), lambda: np.array([0.0, 0.5, 1.0])
    ),
    "labels": Door("labels", lambda x: parts()[0].head.observations(x), lambda: np.array([0, 2, 1])),
    "weights of a problem": Door("weights", weights_in_a_problem, plain(4)),
    "weights of a loss": Door(
        "weights", lambda x: least_squares(parts()[2], parts()[0].batch.inputs, parts()[0].batch.inputs, x), plain(4)
    ),
    "weights of a run": Door("weights", lambda x: parts()[1].run(parts()[0].batch.inputs, RunningCost(0.5), x), plain(4)),
    "weights of a co-state": Door(
        "weights", lambda x: solve_costate(*trajectory(), running=RunningCost(0.5), weights=x), plain(4)
    ),
    "bounds": Door(
        "bounds",
        lambda x: train(parts()[0], {"tao_max_it": 1}, bounds={"kernel": (None, x)}, monitor=lambda _: True),
        lambda: np.full((4, 3), 1e3),
        takes=("infinite",),
    ),
    "LowRankKernel.norm": Door("beta", lambda x: LowRankKernel(*[laplace("disk", "CG1", 4)] * 2).norm(x), plain(4, 4)),
    "LowRankKernel.bound": Door(
        "coefficients", lambda x: LowRankKernel(*[laplace("disk", "CG1", 4)] * 2).bound(x), plain(4, 4)
    ),
    "singular_system": Door(
        "beta", lambda x: singular_system(LowRankKernel(*[laplace("disk", "CG1", 4)] * 2), x), plain(4, 4)
    ),
    "compress, beta": Door(
        "beta", lambda x: compress(LowRankKernel(*[laplace("disk", "CG1", 4)] * 2), 0.1, beta=x), plain(4, 4)
    ),
    "compress, values": Door("kernel", lambda x: compress(x, 0.1, cells()), lambda: np.eye(6)),
    "point_space, weights": Door("weights", point_space, plain(3)),
    "point_space, points": Door("points", lambda x: point_space([1.0, 2.0, 3.0], x), plain(3, 2)),
    "point_space, graph": Door("graph", lambda x: point_space(np.ones(3), graph=x), lambda: 1 - np.eye(3), takes=("sparse",)),
    "from_network, a": Door("a", lambda x: from_network(x, np.eye(6), np.ones(6), cells()), plain(6)),
    "from_network, B": Door("B", lambda x: from_network(np.ones(6), x, np.ones(6), cells()), lambda: np.eye(6)),
    "from_network, z_0": Door("z_0", lambda x: from_network(np.ones(6), np.eye(6), x, cells()), plain(6)),
    "from_network, tau": Door("tau", lambda x: from_network(np.ones(6), np.eye(6), np.ones(6), cells(), tau=x), plain(2)),
    "Box": Door("bias", lambda x: Box(x, (0, 1)), plain(2)),
    "Polygon": Door("corners", Polygon, lambda: np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])),
    "Points": Door("points", Points, plain(4, 2)),
    "Ellipse, centre": Door("centre", Ellipse, plain(2)),
    "Ellipse, axes": Door("axes", lambda x: Ellipse((0, 0), x), lambda: np.eye(2)),
    "Sections": Door("bias", lambda x: Sections(x, np.zeros_like, np.ones_like), plain(2)),
    "RowBox": Door("bias", lambda x: RowBox(laplace("disk", "CG1", 4), x, (0, 1)), plain(2)),
    "SpanBox": Door("kernel", lambda x: SpanBox(*[laplace("disk", "CG1", 4)] * 2, (0, 1), x), plain(2)),
    "A.contains": Door("a", lambda x: Box((0, 1), (0, 1)).contains(x, 0.5), plain(3), takes=ANY_SHAPE),
    "A.sections": Door("a", Ellipse().sections, plain(3), takes=ANY_SHAPE),
    "A.support": Door("beta", lambda x: Ellipse().support(1.0, x), plain(3), takes=ANY_SHAPE),
    "A.largest": Door("positive", lambda x: Points([(0, 1)]).largest(x, 1.0), plain(3), takes=ANY_SHAPE),
    "Pair": Door("f", lambda x: Pair(x, np.ones((3, 2)), "minimise"), plain(3, 2)),
    "fit_growth, times": Door("times|norms", lambda x: fit_growth(x, np.exp(plain(6, 1)())), plain(6)),
    "fit_growth, norms": Door("norms", lambda x: fit_growth(plain(6)(), x), plain(6, 1)),
    "circle_radius, A": Door("A", lambda x: circle_radius(x, [1.0]), lambda: np.zeros((1, 1))),
    "circle_radius, b": Door("(A, )?b", lambda x: circle_radius([[0.0]], x), plain(1)),
    "solve_value_function, target": Door(
        "target",
        lambda x: solve_value_function(
            class_space(1, COMM_SELF), Box((-1, 1), (0, 0)), "identity", x, StateGrid([[0.0]], 0.25), final_time=1.0
        ),
        plain(1),
    ),
    "solve_value_function, start": Door(
        "start",
        lambda x: solve_value_function(
            class_space(1, COMM_SELF), Box((-1, 1), (0, 0)), "identity", [1.0], StateGrid(x, 0.25), final_time=1.0
        ),
        plain(1, 2),
    ),
    "feedback_speeds": Door("v", lambda x: feedback_speeds(value_function(), x, 0.0), lambda: np.array([[0.1, 0.2]])),
    "closed_loop": Door("v", lambda x: closed_loop(value_function(), x), lambda: np.array([[0.1, 0.2]])),
}


def _with(value):
    def change(good):
        changed = np.array(good, dtype=float)
        changed.flat[-1] = value
        return changed

    return change


def _masked(good):
    return np.ma.array(good, mask=np.arange(good.size).reshape(good.shape) == 0)


BAD = {
    "complex": lambda good: good + 0j,
    "complex in a list": lambda good: (good + 0j).tolist(),
    "masked": _masked,
    "rows masked": lambda good: [_masked(row) if row.ndim else np.ma.masked for row in good],
    "sparse": lambda good: scipy.sparse.csr_array(np.atleast_2d(good)),
    "objects": lambda good: good.astype(object),
    "strings": lambda good: good.astype(str).tolist(),
    "NaN": _with(np.nan),
    "infinite": _with(np.inf),
    "another shape": lambda good: good[None, None, None],
    "empty": lambda good: np.zeros((0,) * good.ndim),
    "ragged": lambda good: [[1.0], [1.0, 2.0]],
    "a Function": lambda good: fd.Function(label_space("sphere", "CG1").V),
    "a dictionary": lambda good: {"a": 1.0},
}


class Readable:
    """An object that NumPy reads by `__array__`, such as a data frame."""

    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self._values, dtype)


GOOD = {
    "a list": lambda good: good.tolist(),
    "integers": lambda good: good.astype(int) if (good == good.astype(int)).all() else good,
    "Fortran's order": lambda good: np.asfortranarray(good),
    "a stride": lambda good: np.repeat(good, 2, axis=0)[::2],
    "a mask that masks nothing": lambda good: np.ma.array(good, mask=np.zeros(good.shape, bool)),
    "an array by __array__": Readable,
}


def refusals(name: str, of_all: bool) -> None:
    """Every kind of wrong array at a door, on all ranks, or on the last one alone."""
    door = DOORS[name]
    good = door.good()
    for kind, change in BAD.items():
        if kind in door.takes or not of_all and kind == "a Function":  # to have a Function is collective
            continue
        bad = change(good)
        try:
            door.call(bad if of_all or COMM_WORLD.rank == COMM_WORLD.size - 1 else good)
            said = "nothing"
        except (TypeError, ValueError) as error:
            said = str(error)
        assert re.match(rf"({door.argument})\b.*: ", said), f"of {kind} it said: {said}"
        assert len(set(COMM_WORLD.allgather(said))) == 1, kind


@pytest.mark.whole
@pytest.mark.parametrize("name", DOORS)
def test_an_array_that_is_none_of_real_finite_numbers_is_refused_by_name(name):
    refusals(name, of_all=True)


@pytest.mark.parallel(2)
@pytest.mark.parametrize("name", [name for name, door in DOORS.items() if door.in_parts])
def test_what_is_wrong_with_the_part_of_one_rank_is_refused_on_all(name):
    refusals(name, of_all=False)


@pytest.mark.whole
@pytest.mark.parametrize("name", DOORS)
def test_what_reads_as_an_array_of_real_numbers_is_welcome(name):
    door = DOORS[name]
    for change in GOOD.values():
        good = door.good()
        door.call(change(good))


# -- numbers and names -------------------------------------------------------------------------------------------------


def _net(**options):
    return flat_network(laplace("disk", "CG1", 4), **{"layers": 1} | options)


def _initial():
    return parts()[0].batch.inputs


#: Every number that a public function takes, by its name in messages.
NUMBERS = {
    "layers.final_time": lambda x: _net(final_time=x),
    "layers.times": lambda x: _net(layers=x),
    "layers.steps": lambda x: _net(steps=x),
    "layers.per_block": lambda x: _net(layers_per_block=x),
    "tolerance": lambda x: _net().truncated(x),
    "classes": class_space,
    "onto": lambda x: Head(laplace("disk", "CG1", 4), x),
    "samples": lambda x: parts()[2].batch_space(x),
    "rank": lambda x: laplace_basis(parts()[2], x),
    "functions": lambda x: given_basis(parts()[2], [x]),
    "weight": tikhonov,
    "weight ": smooth_in_space,
    "weight  ": smooth_in_time,
    "kernel": lambda x: RunningCost(0.5, x),
    "weight   ": lambda x: Derivatives(parts()[0].batch.inputs, parts()[0].batch.inputs, x),
    "size": lambda x: parts()[0].minibatches(x),
    "seed": lambda x: parts()[0].minibatches(2, x),
    "rank ": PositiveSemidefinite,
    "damping": DampedAntisymmetric,
    "bound": NormBounded,
    "radius": lambda x: RowBall(laplace("disk", "CG1", 4), x),
    "count": lambda x: hessian_spectrum(parts()[0], x),
    "count ": lambda x: Box((0, 1), (0, 1)).sample(x),
    "grid": lambda x: Sections((0, 1), np.zeros_like, np.ones_like, grid=x),
    "tau": lambda x: ProximalStep(tau=x),
    "step": lambda x: train_pam(parts()[0], step=x),
    "iterations": lambda x: train_pam(parts()[0], iterations=x),
    "gradient_tolerance": lambda x: train_pam(parts()[0], gradient_tolerance=x),
    "accuracy": lambda x: ProximalStep(accuracy=x),
    "gradient_tolerance ": lambda x: LocalFeedback(parts()[0], gradient_tolerance=x),
    "steps ": lambda x: schedule_of(2, x),
    "tolerance  ": lambda x: compress(np.eye(6), x, cells()),
    "confidence": lambda x: KernelSampling(confidence=x),
    "largest_rank": lambda x: compress(np.eye(6), 0.1, cells(), largest_rank=x),
    "halvings": lambda x: depth_limit(_net(), _initial(), halvings=x),
    "tolerance   ": lambda x: find_steady_states(_net(), tolerance=x),
    "tolerance    ": lambda x: find_equilibria(_net(), tolerance=x),
    "tolerance      ": lambda x: picard(_net(), _initial(), tolerance=x),
    "max_iterations": lambda x: picard(_net(), _initial(), max_iterations=x),
    "tolerance       ": lambda x: singular_system(LowRankKernel(*[laplace("disk", "CG1", 4)] * 2), np.eye(4), x),
    "tolerance        ": lambda x: pmp_residual(parts()[0].replace(regulariser=None), Box((-9, 9), (-9, 9)), tolerance=x),
    "at": lambda x: autonomous_problem(_net(), x),
    "start": lambda x: solve_linearised(trajectory()[0], _initial(), x),
    "t": lambda x: trajectory()[0].layer_at(x),
    "t ": lambda x: closed_loop(value_function(), [[0.0]], x),
    "steps  ": lambda x: closed_loop(value_function(), [[0.0]], steps=x),
    "final_time ": lambda x: _value_function(final_time=x),
    "spacing": lambda x: _value_function(spacing=x),
    "memory": lambda x: _value_function(memory=x),
}
#: Where None has a meaning.
OPTIONAL = {"layers.per_block", "layers.final_time", "seed", "rank ", "at", "steps  "}


def _parts():
    problem = parts()[0]
    return problem.net, None, least_squares, None, Batch(problem.batch.inputs, problem.batch.inputs)


def _value_function(**options):
    final_time = options.pop("final_time", 1.0)
    grid = StateGrid([[0.0]], **{"spacing": 0.25} | options)
    return solve_value_function(
        class_space(1, COMM_SELF), Box((-1, 1), (0, 0)), "identity", [1.0], grid, final_time=final_time
    )


@pytest.mark.whole
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_name(name):
    for wrong in ("1", None, True, 1j, np.nan, [1.0, 2.0], -1e9):
        if (wrong is None and name in OPTIONAL) or (wrong == -1e9 and name == "functions"):
            continue
        with pytest.raises(ValueError, match=rf"^{name.strip()}(, end)?: expected .*, got {re.escape(repr(wrong))}"):
            NUMBERS[name](wrong)
            pytest.fail(f"{name} took {wrong!r}")


CHOICES = {
    "prediction": (lambda x: Head(laplace("disk", "CG1", 4), 3, x), "'softmax'"),
    "prediction ": (lambda x: Loss("mine", least_squares.value, least_squares.gradient, x), "'softmax'"),
    "learn": (lambda x: LearningProblem(*_parts(), learn=x), "'initial'"),
    "precision": (lambda x: _net(precision=x), "'single'"),
    "bias.in_time": (lambda x: _net(bias_in_time=x), "'linear'"),
    "kernel.in_time": (lambda x: _net(kernel_in_time=x), "'linear'"),
    "kind": (lambda x: LowRankKernel(*[laplace("disk", "CG1", 4)] * 2).norm(np.eye(4), x), "'operator'"),
    "norm": (lambda x: integrated_norms(_net(), x), "'operator'"),
    "name": (lambda x: GrowthMonitor(_net()).norms(x), "'L1'"),
    "convention": (lambda x: Pair(np.ones((3, 1)), np.ones((3, 1)), x), "'maximise'"),
    "variant": (
        lambda x: msa(parts()[0].replace(regulariser=None), RowBox(laplace("disk", "CG1", 4), (-9, 9), (-9, 9)), variant=x),
        "'damped'",
    ),
    "activation": (lambda x: get_activation(f"{x}"), "'tanh'"),
    "solver_parameters": (lambda x: _net(solver_parameters={"ts_type": x}), "rk"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_name_that_is_none_of_those_known_is_refused_with_these(name):
    call, known = CHOICES[name]
    for wrong in ("probit", 3):
        with pytest.raises((TypeError, ValueError)) as refused:
            call(wrong)
        assert re.match(name.strip(), str(refused.value)) and (known in str(refused.value)), refused.value


def test_numbers_and_names_are_what_they_are():
    assert number("x", np.float32(0.5)) == 0.5 and number("x", np.array(2), above=1, below=3) == 2.0
    assert integer("n", np.int8(3), least=3, most=3) == 3 and choice("c", "a", ("a", "b")) == "a"
    for call, message in [
        (lambda: number("x", 2, above=0, below=1), "x: expected a number > 0 and < 1, got 2"),
        (lambda: number("x", -1, least=0), "x: expected a number >= 0, got -1"),
        (lambda: number("x", 10**400), "x: expected a number"),
        (lambda: number("x", np.float32(np.inf)), "x: expected a number, got np.float32(inf)"),
        (lambda: integer("n", 0), "n: expected a positive integer, got 0"),
        (lambda: integer("n", 9, most=4), "n: expected an integer from 1 to 4, got 9"),
        (lambda: integer("n", 1.0), "n: expected a positive integer, got 1.0"),
        (lambda: choice("c", {}, ("a", "b")), "c: expected one of 'a', 'b', got {}"),
        (lambda: real_array("w", [1, -2], least=0), "w: expected numbers >= 0, got -2 among them"),
        (lambda: real_array("w", 1j * np.ones(1)), "w: expected real numbers, got complex ones; take .real"),
    ]:
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            call()


# -- weights of samples ------------------------------------------------------------------------------------------------


def test_of_weights_proportions_alone_matter_however_large_they_are():
    problem, net, _ = parts()
    expected = weights_in_a_problem([1.0, 2.0, 4.0, 0.0]).evaluate()[0]
    for size in (1e-300, 1e300, 4e307):
        found = weights_in_a_problem(np.array([1.0, 2.0, 4.0, 0.0]) * size).evaluate()[0]
        assert float(found) == pytest.approx(float(expected), rel=1e-13)
    seven = Batch(net.Y.batch(smooth(net.Y, 7)), np.arange(7) % 3)
    alike = LearningProblem(net, problem.head, cross_entropy, None, seven).evaluate()[0]
    large = Batch(seven.inputs, seven.targets, [1e308] * 7)
    found = LearningProblem(net, problem.head, cross_entropy, None, large).evaluate()[0]
    assert float(found) == pytest.approx(float(alike), rel=1e-14)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_each_minibatch_counts_and_their_mean_is_the_loss_of_the_whole(size, seed):
    problem, net, _ = parts()
    weights = np.array([0.0, 0.0, 3.0, 0.0, 1.0, 2.0, 0.0])
    batch = Batch(net.Y.batch(smooth(net.Y, 7)), np.arange(7) % 3, weights)
    whole = LearningProblem(net, problem.head, cross_entropy, None, batch)
    pieces = whole.minibatches(size, seed)
    assert [piece.samples for piece in pieces] == [size] * -(-3 // size)
    shares = [sum(piece.weights) for piece in pieces]
    assert min(shares) > 0 and sum(shares) == pytest.approx(1.0, rel=1e-14)
    losses = [float(LearningProblem(net, problem.head, cross_entropy, None, piece).evaluate()[0]) for piece in pieces]
    assert np.dot(shares, losses) == pytest.approx(float(whole.evaluate()[0]), rel=1e-13)


# -- batches of Functions ----------------------------------------------------------------------------------------------


@on_ranks
def test_a_batch_of_functions_has_their_node_values_side_by_side():
    _, _, Y = parts()
    values = smooth(Y, 4)
    functions = [fd.Function(Y.V) for _ in range(4)]
    for s, f in enumerate(functions):
        f.dat.data_wo[...] = values[:, s]
    together = Y.batch(values)
    assert_array_equal(Y.values(Y.batch(functions)), values)
    assert_array_equal(Y.values(Y.batch(functions[1])), values[:, 1:2])
    assert_array_equal(Y.values(Y.batch(tuple(functions[2:]) + (together,))), np.hstack([values[:, 2:], values]))
    copy = Y.batch(together)
    copy.dat.data_wo[...] = 0.0
    assert copy is not together and (Y.values(together) == values).all()
    elsewhere, sphere = fd.Function(label_space("disk", "DG0").V), fd.Function(label_space("sphere", "CG1").V)
    for wrong, kind, message in [
        (sphere, ValueError, "pictures: expected Functions on a mesh in space of 2 dimensions, got one of 3"),
        ([functions[0], elsewhere], ValueError, "pictures: expected continuous Functions, .*, got one of .*DG0"),
        ([functions[0], values[:, 0]], TypeError, "pictures: expected a Function, got ndarray"),
        ([functions[0], 1.0], TypeError, "pictures: expected a Function, got float"),
        (fd.Cofunction(Y.V.dual()), TypeError, "pictures: expected numbers"),
    ]:
        with pytest.raises(kind, match=f"^{message}"):
            Y.batch(wrong, "pictures")
    with taping(), pytest.raises(ValueError, match="^pictures: the tape is annotating"):
        Y.batch(functions, "pictures")


# -- points ------------------------------------------------------------------------------------------------------------


@on_two_ranks
def test_the_order_of_points_is_of_no_consequence():
    """A network on a cloud, and the eigenvectors of a graph, do not depend on the order of the points."""
    rng = np.random.default_rng(7)
    K, order = 11, rng.permutation(11)
    w, x, f = rng.uniform(0.2, 2.0, K), rng.normal(size=(K, 2)), rng.normal(size=(K, 3))
    A = rng.uniform(size=(K, K)) * (rng.uniform(size=(K, K)) < 0.5)
    A = A + A.T
    A += np.eye(K, k=1) + np.eye(K, k=-1)
    beta, a = rng.normal(size=(3, 3)), rng.normal(size=K)
    found = []
    for p in (np.arange(K), order):
        Y = point_space(w[p], x[p])
        own = p[Y.numbers]
        net = ResidualNetwork(Basis(Y, np.column_stack([1 + 0 * own, x[own]]), "given"), layers=1)
        net.kernel.set(0, beta)
        net.bias.set(0, a[own])
        final = np.zeros((K, 3))
        final[own] = Y.values(net(Y.batch(f[own])))
        graph = point_space(w[p], x[p], A[p][:, p])
        modes = laplace_basis(graph, 4)
        values = np.zeros((K, 4))
        values[p[graph.numbers]] = modes.values
        found.append((Y.sum(final), modes.eigenvalues, np.abs(graph.sum(values))))
        for points in (x[p], None):
            with pytest.raises(ValueError, match="^Y: .* is a set of points, which has a Laplacian only with a graph"):
                laplace_basis(point_space(w[p], points), 3)
    for first, second in zip(*found):
        assert_allclose(first, second, rtol=0, atol=1e-11)


def test_a_weight_that_coordinates_cannot_hold_is_refused():
    for weights, points in [([1e10, 1e-10], None), ([1.0, 1e-9], [[0.0], [1e6]])]:
        with pytest.raises(ValueError, match="^weights: expected .*, got 1e-.* for point 1, which is lost in the round-off"):
            point_space(weights, points)
    with pytest.raises(ValueError, match="^weights: expected numbers with a finite sum"):
        point_space([1e308] * 7)
    assert_allclose(point_space([1.0, 1e-9], [[1e6], [0.0]]).measure, 1.0 + 1e-9, rtol=1e-9)


# -- spaces ------------------------------------------------------------------------------------------------------------


def moved(start: fd.MeshGeometry, family: str, degree: int, to: Callable) -> fd.MeshGeometry:
    """A mesh whose coordinates are functions of the given ones, and have this degree."""
    x = fd.SpatialCoordinate(start)
    return fd.Mesh(fd.Function(fd.VectorFunctionSpace(start, family, degree)).interpolate(fd.as_vector(to(x))))


def flat(name: str):
    """A closed surface or curve without its last coordinate, as read from a file with too small a `dim`."""
    closed = {
        "torus": lambda: fd.TorusMesh(8, 6, 1.0, 0.4),
        "sphere of quadrilaterals": lambda: fd.UnitCubedSphereMesh(1),
        "circle": lambda: fd.CircleManifoldMesh(8),
    }[name]()
    x = fd.SpatialCoordinate(closed)
    space = fd.VectorFunctionSpace(closed, "CG", 1, dim=closed.topological_dimension)
    return fd.Mesh(fd.Function(space).interpolate(fd.as_vector([x[k] for k in range(closed.topological_dimension)])))


def element(kind: str, base: fd.MeshGeometry):
    cg = fd.FiniteElement("CG", base.ufl_cell(), 1)
    bubble = fd.FiniteElement("B", base.ufl_cell(), 3)
    return {"broken": lambda: fd.BrokenElement(cg), "facet": lambda: cg["facet"], "enriched": lambda: cg + bubble}[kind]()


def disk():
    return mesh("disk")


#: Spaces that are taken: a function that makes each, and a space with the same integrals.
RIGHT_SPACES = {
    "a component, collapsed": (lambda: fd.VectorFunctionSpace(disk(), "CG", 1).sub(0).collapse(), None),
    "broken": (lambda: fd.FunctionSpace(disk(), element("broken", disk())), ("DG", 1)),
    "on facets, which are all": (lambda: fd.FunctionSpace(disk(), element("facet", disk())), None),
    "averages": (lambda: fd.FunctionSpace(disk(), "DG", 0, variant="integral"), ("DG", 0)),
}

REFUSED_SPACES = {
    "VectorFunctionSpace.sub(0)": (
        lambda: fd.VectorFunctionSpace(disk(), "CG", 1).sub(0),
        "V: expected a space of its own.*collapse",
    ),
    "part of a mixed one": (
        lambda: (fd.FunctionSpace(disk(), "CG", 1) * fd.FunctionSpace(disk(), "DG", 0)).sub(1),
        "V: expected a space of its own.*collapse",
    ),
    "restricted": (
        lambda: fd.RestrictedFunctionSpace(fd.FunctionSpace(disk(), "CG", 1), ["on_boundary"]),
        "V: expected a space with all its nodes, got one restricted on on_boundary",
    ),
    "of points": (
        lambda: fd.FunctionSpace(fd.VertexOnlyMesh(disk(), [[0.1, 0.2], [-0.3, 0.1]]), "DG", 0),
        r"V: expected a mesh of cells, got one of points alone; point_space\(weights, points\)",
    ),
    "Quadrature": (lambda: fd.FunctionSpace(disk(), "Quadrature", 2), "V: expected functions between the nodes too"),
    "DG L2": (lambda: fd.FunctionSpace(disk(), "DG L2", 1), "V: expected point values as degrees of freedom"),
    "enriched": (lambda: fd.FunctionSpace(disk(), element("enriched", disk())), "V: the weights of .* add up to"),
    "mixed": (lambda: fd.FunctionSpace(disk(), "CG", 1) * fd.FunctionSpace(disk(), "DG", 0), "V: expected a scalar space"),
    "tensor": (lambda: fd.TensorFunctionSpace(disk(), "CG", 1), "V: expected a scalar space"),
    "dual": (lambda: fd.FunctionSpace(disk(), "CG", 1).dual(), "V: expected a FunctionSpace"),
    "a Function": (lambda: fd.Function(fd.FunctionSpace(disk(), "CG", 1)), "V: expected a FunctionSpace"),
    "a flat torus": (lambda: fd.FunctionSpace(flat("torus"), "CG", 1), r"V: expected cells .* lie on each other.*dim=3"),
    "a flat sphere": (
        lambda: fd.FunctionSpace(flat("sphere of quadrilaterals"), "DG", 0),
        "V: expected cells that lie side by side",
    ),
    "a flat circle": (lambda: fd.FunctionSpace(flat("circle"), "CG", 1), "V: expected cells that lie side by side"),
    "prisms on a flat torus": (
        lambda: fd.FunctionSpace(fd.ExtrudedMesh(flat("torus"), 1), "CG", 1),
        "V: expected cells that lie side by side",
    ),
}


@pytest.mark.parametrize("kind", RIGHT_SPACES)
def test_a_space_that_is_another_by_name_has_the_same_integrals(kind):
    make, alike = RIGHT_SPACES[kind]
    V = make()
    Y = LabelSpace(V)
    same = LabelSpace(fd.FunctionSpace(V.mesh(), *(alike or ("CG", 1))))
    of = [space.sum(space.weights @ (1 + space.coordinates)) for space in (Y, same)]  # nodes may differ: DG's lie inside
    assert Y.size == same.size
    assert_allclose(*of, rtol=1e-13)


@on_two_ranks
@pytest.mark.parametrize("kind", REFUSED_SPACES)
def test_a_space_that_has_no_nodes_of_its_own_is_refused_at_once(kind):
    make, message = REFUSED_SPACES[kind]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        LabelSpace(make())


@pytest.mark.parametrize(
    "family, degree, quadrilateral", [("CG", 1, False), ("DG", 0, False), ("DG", 1, False), ("CG", 2, True)]
)
def test_curved_cells_have_the_weights_of_their_own_shape(family, degree, quadrilateral):
    """The map (x, y) -> (x + y^2 / 5, y) keeps every area, and gives every cell a curved edge."""
    straight = fd.UnitSquareMesh(3, 4, quadrilateral=quadrilateral)
    curved = moved(straight, "CG", 2, lambda x: [x[0] + x[1] ** 2 / 5, x[1]])
    before, after = (LabelSpace(fd.FunctionSpace(each, family, degree)) for each in (straight, curved))
    assert_allclose(after.weights, before.weights, rtol=1e-13)
    expected = before.coordinates + np.stack([before.coordinates[:, 1] ** 2 / 5, 0 * before.weights], axis=1)
    assert_allclose(after.coordinates, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fd.PeriodicUnitSquareMesh(3, 3),
        lambda: fd.PeriodicUnitSquareMesh(3, 3, quadrilateral=True),
        lambda: fd.PeriodicIntervalMesh(5, 1.0),
        lambda: fd.AnnulusMesh(1.0, 0.4, 2, 8),
        lambda: fd.TorusMesh(6, 5, 1.0, 0.4),
        lambda: moved(
            fd.UnitSquareMesh(3, 3, quadrilateral=True), "CG", 2, lambda x: [x[0] + x[1] ** 2 / 5, x[1] + x[0] * x[1]]
        ),
        lambda: fd.ExtrudedMesh(fd.PeriodicUnitSquareMesh(3, 3), 2),
    ],
    ids=["periodic", "periodic quadrilaterals", "periodic interval", "annulus", "torus", "curved", "periodic prisms"],
)
def test_meshes_that_go_round_are_not_taken_for_folded_ones(make):
    V = fd.FunctionSpace(make(), "DG", 0)
    assert LabelSpace(V).measure == pytest.approx(fd.assemble(fd.Constant(1.0) * fd.dx(domain=V.mesh())), rel=1e-12)


# -- what other doors say ----------------------------------------------------------------------------------------------


def test_files_say_what_they_take(tmp_path):
    problem, net, _ = parts()
    for arguments, message in [
        (
            (tmp_path / "net.h5", problem.head),
            "net: expected a ResidualNetwork, got Head; the network is the second argument: save.path, net, head.",
        ),
        ((net, problem.head), "net: expected a ResidualNetwork"),
        ((net, net), "path: expected a str or PathLike, got ResidualNetwork"),
        ((tmp_path / "net.h5", net, net), "head: expected a Head or None, got ResidualNetwork"),
    ]:
        with pytest.raises(TypeError, match=f"^{message}"):
            save(*arguments)


def test_a_schedule_without_derivatives_is_refused(tape):
    problem, net, _ = parts()
    message = "^checkpoints: expected a schedule for derivatives, got NoneCheckpointSchedule.*SingleMemoryStorageSchedule"
    with pytest.raises(ValueError, match=message):
        LearningProblem(net, problem.head, cross_entropy, None, problem.batch, checkpoints=NoneCheckpointSchedule())
    with pytest.raises(ValueError, match=message):
        enable_checkpointing(tape, lambda steps: NoneCheckpointSchedule(), 2)


@pytest.mark.parametrize("regularised", [False, True])
@pytest.mark.parametrize("gauss_newton", [False, True])
def test_a_hessian_says_that_it_wants_the_derivative_first(regularised, gauss_newton):
    problem, net, _ = parts()
    problem = LearningProblem(net, problem.head, cross_entropy, tikhonov(0.1) if regularised else None, problem.batch)
    J, _ = problem.record(gauss_newton=gauss_newton)
    h = [function.copy(deepcopy=True) for function in problem.functions]
    with pytest.raises(RuntimeError, match=r"the Hessian needs the derivative at the same point first; call derivative\(\)"):
        J.hessian(h)
    J(problem.functions)
    J.derivative()
    J.hessian(h)
    J([function._ad_mul(0.5) for function in problem.functions])
    if not gauss_newton:
        with pytest.raises(RuntimeError, match="the Hessian needs the derivative at the same point first"):
            J.hessian(h)
