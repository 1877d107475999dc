"""Heads, losses, Tikhonov and the LearningProblem that holds them: against formulas, and their gradients."""

import firedrake as fd
import mpmath
import numpy as np
import pytest
from firedrake import COMM_WORLD
from firedrake.adjoint import taylor_test
from helpers import SAMPLES, label_space, laplace, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import CLASSES, TIMES, directions, gathered, gradients, learning_problem, network, polynomials, taping, towards
from pyadjoint import Control, ReducedFunctional, Tape, get_working_tape, set_working_tape
from pyadjoint.tape import annotate_tape
from scipy.special import logsumexp, softmax

from fem_resnet.label_domain.basis import cell_indicators
from fem_resnet.label_domain.points import class_space
from fem_resnet.learning.batch import Batch
from fem_resnet.learning.head import Head
from fem_resnet.learning.loss import Loss, cross_entropy, least_squares
from fem_resnet.learning.problem import LearningProblem
from fem_resnet.learning.regulariser import smooth_in_space, smooth_in_time, tikhonov
from fem_resnet.network.network import ResidualNetwork
from fem_resnet.network.settings import Kernel, Layers
from fem_resnet.tape.recording import apply

on_ranks = pytest.mark.parallel([1, 2, 3])
#: For what sees no partition, and for messages: once on several ranks is enough.
on_two_ranks = pytest.mark.parallel([1, 2])

# Sums of some hundred numbers of size one.
ROUND_OFF = 1e-13


def _owned_classes(Y):
    """Which classes this rank's nodes of a class space stand for."""
    return np.floor(Y.coordinates[:, 0]).astype(int)


def _class_batch(Y, values):
    """A batch on a class space from values of shape (classes, samples) that every rank has."""
    return Y.batch(np.asarray(values)[_owned_classes(Y)])


def _recorded(functional, function, Y):
    """A functional of one batch as a ReducedFunctional, with the label measure's Riesz map."""
    with taping():
        J = functional(function)
    return ReducedFunctional(J, Control(function, riesz_map=Y.riesz_map))


# -- head ------------------------------------------------------------------------------------------------------------


def _head(domain="disk", element="CG1", classes=CLASSES, seed=0):
    """With a basis that is not orthonormal."""
    head = Head(polynomials(label_space(domain, element)), classes)
    rng = np.random.default_rng(seed)
    head.W.set(0, rng.normal(size=(classes, 3)))
    head.mu.set(0, rng.normal(size=classes))
    return head


def _dense_output(head, f):
    """O_k = int W(k, z) f(z) dz + mu_k with W(k, z) = sum_j W_kj psi_j(z), on every rank."""
    Y = head.psi.Y
    psi, w, f = (gathered(Y, values) for values in (head.psi.values, Y.weights, Y.values(f)))
    return np.einsum("kj,zj,z,zs->ks", head.W.get(0), psi, w, f) + head.mu.get(0)[:, None]


@on_ranks
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("domain, element", [("disk", "DG0"), ("sphere", "CG1"), ("square", "CG3"), ("cube", "CG1")])
def test_head_is_the_integral_of_the_final_state_against_w(domain, element, classes):
    """(2.9) in one order of arguments, O(y) = int W(y, z) f(z) dz + mu(y) (errata, 4.2 and Remark 4.3)."""
    head = _head(domain, element, classes)
    f = head.psi.Y.batch(smooth(head.psi.Y))
    exact = _dense_output(head, f)
    O = head(f)
    assert O.function_space() == head.Y.batch_space(SAMPLES)
    bound = 10 * ROUND_OFF * np.abs(exact).max()
    assert_allclose(head.Y.values(O), exact[_owned_classes(head.Y)], rtol=0, atol=bound)
    assert_allclose(head.scores(f), exact.T, rtol=0, atol=bound)
    assert abs(head.Y.measure - classes) < ROUND_OFF * classes


@on_ranks
def test_head_reads_one_function_as_a_batch_of_one():
    head = _head()
    f = fd.Function(head.psi.Y.V)
    f.dat.data_wo[...] = smooth(head.psi.Y, 1)[:, 0]
    batch = head.psi.Y.batch(f.dat.data_ro)
    assert head.scores(f).shape == (1, CLASSES)
    assert_array_equal(head.scores(f), head.scores(batch))
    assert_array_equal(head.Y.values(head(f)), head.Y.values(head(batch)))


@on_ranks
def test_head_starts_at_zero_and_names_its_parameters():
    head = Head(laplace("disk", "CG1", 4), 3)
    assert [parameter.name for parameter in head.parameters] == ["W", "mu"]
    assert head.W.get(0).shape == (3, 4) and head.mu.get(0).shape == (3,)
    assert not head.scores(head.psi.Y.batch(smooth(head.psi.Y))).any()


@on_ranks
def test_scores_leave_nothing_on_the_tape():
    head = _head()
    f = head.psi.Y.batch(smooth(head.psi.Y))
    with taping():
        head.scores(f)
    assert not get_working_tape().get_blocks()


@on_ranks
def test_observations_are_the_indicators_of_the_labels():
    head = _head(classes=4)
    labels = [3, 0, 3]
    C = head.Y.values(head.observations(labels))
    assert_array_equal(C, np.eye(4)[:, labels][_owned_classes(head.Y)])
    assert_array_equal(head.Y.values(head.observations(np.array(labels, dtype=np.uint8))), C)


@on_ranks
@pytest.mark.parametrize("control", ["f", "W", "mu", "all"])
@pytest.mark.parametrize("domain, element", [("disk", "DG0"), ("sphere", "CG1"), ("square", "CG3")])
def test_gradient_of_the_head(domain, element, control, taylor):
    head = _head(domain, element)
    Y = head.psi.Y
    f = Y.batch(smooth(Y))
    targets = _class_batch(head.Y, np.random.default_rng(2).normal(size=(CLASSES, SAMPLES)))
    with taping():
        J = least_squares(head.Y, head(f), targets)
    controls = [Control(f, riesz_map=Y.riesz_map), *head.W.controls(), *head.mu.controls()]
    random = [Y.batch(smooth(Y, seed=3)), fd.Function(head.W.space_basis.space), fd.Function(head.mu.space_basis.space)]
    for parameter, direction in zip(head.parameters, random[1:]):
        shape = parameter.space_basis.shape
        parameter.space_basis.write(direction, np.random.default_rng(3).normal(size=shape))
    chosen = slice(None) if control == "all" else slice(["f", "W", "mu"].index(control), None)
    chosen = slice(chosen.start, None if control == "all" else chosen.start + 1)
    J = ReducedFunctional(J, controls[chosen])
    h = [towards(g, r) for g, r in zip(J.derivative(apply_riesz=True), random[chosen])]
    taylor(J, [c.control for c in controls[chosen]], h, f"{domain} {element}, head alone", control)


# -- losses ----------------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_cross_entropy_is_logsumexp_less_the_output_of_the_label(classes, rng):
    Y = class_space(classes)
    O, labels = 3 * rng.normal(size=(classes, 7)), rng.integers(classes, size=7)
    C = np.eye(classes)[:, labels]
    exact = np.mean(logsumexp(O, axis=0) - O[labels, np.arange(7)])
    found = cross_entropy(Y, _class_batch(Y, O), _class_batch(Y, C))
    assert abs(found - exact) < 1e-14 * np.abs(O).max()


@on_ranks
@pytest.mark.parametrize("domain, element", [("disk", "DG0"), ("sphere", "CG1"), ("square", "CG3")])
def test_cross_entropy_on_a_label_domain_is_that_of_a_density(domain, element):
    """- int C log p dy with p = e^O / int e^O, for C >= 0 that does not integrate to one."""
    Y = label_space(domain, element)
    O, C = 2 * smooth(Y), smooth(Y, seed=1) ** 2
    o, c, w = gathered(Y, O), gathered(Y, C), gathered(Y, Y.weights)[:, None]
    log_p = o - logsumexp(o, axis=0, b=w)
    exact = -np.mean(np.sum(w * c * log_p, axis=0))
    assert abs(cross_entropy(Y, Y.batch(O), Y.batch(C)) - exact) < ROUND_OFF * abs(exact)


@on_ranks
@pytest.mark.parametrize("domain, element", [("disk", "DG0"), ("sphere", "CG1")])
def test_gradient_of_cross_entropy_is_the_density_less_the_observation(domain, element):
    Y = label_space(domain, element)
    O, C = Y.batch(2 * smooth(Y)), Y.batch(smooth(Y, seed=1) ** 2)
    gradient = _recorded(lambda O: cross_entropy(Y, O, C), O, Y).derivative(apply_riesz=True)
    o, c, w = (gathered(Y, v) for v in (Y.values(O), Y.values(C), Y.weights[:, None]))
    p = np.exp(o - logsumexp(o, axis=0, b=w))
    exact = (p * np.sum(w * c, axis=0) - c) / SAMPLES
    assert_allclose(gathered(Y, Y.values(gradient)), exact, rtol=0, atol=ROUND_OFF)


#: Outputs whose exponentials overflow and underflow, and what small differences between them leave.
EXTREME = np.array(
    [
        [1e4, -1e4, 1e4, 0.0, -1e4, 800.0],
        [-1e4, -1e4, 1e4, 1e4, -1e4 + 1, 799.0],
        [0.0, 1e4, 1e4, -1e4, -1e4 - 1, -800.0],
    ]
)


@on_two_ranks
@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize("column", range(EXTREME.shape[1]))
def test_cross_entropy_of_outputs_of_1e4_agrees_with_50_digits(column, label):
    Y = class_space(3)
    O, C = _class_batch(Y, EXTREME[:, [column]]), _class_batch(Y, np.eye(3)[:, [label]])
    with mpmath.workdps(50):
        o = [mpmath.mpf(float(x)) for x in EXTREME[:, column]]
        # e^(-20000) is a number to mpmath: nothing is shifted here.
        total = mpmath.fsum(mpmath.exp(x) for x in o)
        value = float(mpmath.log(total) - o[label])
        p = np.array([float(mpmath.exp(x) / total) for x in o])
    J = _recorded(lambda O: cross_entropy(Y, O, C), O, Y)
    # The loss is a difference of numbers of size 1e4.
    assert abs(J(O) - value) <= 4e-16 * 2e4
    gradient = Y.values(J.derivative(apply_riesz=True))[:, 0]
    assert_allclose(gradient, (p - np.eye(3)[label])[_owned_classes(Y)], rtol=0, atol=1e-12)


@on_ranks
def test_cross_entropy_raises_no_floating_point_error():
    Y = class_space(3)
    O, C = _class_batch(Y, EXTREME), _class_batch(Y, np.eye(3)[:, [0, 1, 2, 0, 1, 2]])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        J = _recorded(lambda O: cross_entropy(Y, O, C), O, Y)
        J.derivative()


@on_ranks
@pytest.mark.parametrize("domain", ["disk", "sphere", "annulus"])
def test_least_squares_is_the_formula_of_2_4(domain):
    """1/2 int |f - C|^2 dy, one sample: by UFL in DG0, where the nodal quadrature is exact."""
    Y = label_space(domain, "DG0")
    f, C = (fd.Function(Y.V) for _ in range(2))
    f.dat.data_wo[...], C.dat.data_wo[...] = smooth(Y, 2).T
    exact = fd.assemble((f - C) ** 2 / 2 * fd.dx)
    assert abs(least_squares(Y, f, C) - exact) < ROUND_OFF * exact


@on_ranks
@pytest.mark.parametrize("loss", [least_squares, cross_entropy], ids=lambda loss: loss.name)
def test_loss_of_a_batch_is_the_mean_over_its_samples(loss):
    Y = label_space("disk", "CG1")
    O, C = smooth(Y), smooth(Y, seed=1) ** 2
    single = [loss(Y, Y.batch(O[:, s]), Y.batch(C[:, s])) for s in range(SAMPLES)]
    found = loss(Y, Y.batch(O), Y.batch(C))
    assert abs(found - np.mean(single)) < ROUND_OFF * np.abs(single).max()


@on_ranks
@pytest.mark.parametrize("domain, element", [("disk", "DG0"), ("sphere", "CG1"), ("square", "CG3"), ("classes", "")])
@pytest.mark.parametrize("loss", [least_squares, cross_entropy], ids=lambda loss: loss.name)
def test_gradient_of_a_loss(loss, domain, element, taylor):
    Y = class_space(5) if domain == "classes" else label_space(domain, element)
    O, C = Y.batch(smooth(Y)), Y.batch(smooth(Y, seed=1) ** 2)
    J = _recorded(lambda O: loss(Y, O, C), O, Y)
    h = towards(J.derivative(apply_riesz=True), Y.batch(smooth(Y, seed=2)))
    taylor(J, O, h, f"loss alone: {loss.name}", f"{domain} {element}")


@on_ranks
@pytest.mark.parametrize("loss", [least_squares, cross_entropy], ids=lambda loss: loss.name)
def test_gradient_of_a_loss_agrees_with_central_differences_at_every_node(loss):
    Y = class_space(4)
    o, c = (np.random.default_rng(seed).normal(size=(4, 2)) for seed in (0, 1))
    C = _class_batch(Y, c**2)
    gradient = Y.values(_recorded(lambda O: loss(Y, O, C), _class_batch(Y, o), Y).derivative())
    found = np.empty((4, 2))
    eps = 1e-5
    for k, s in np.ndindex(4, 2):
        e = np.zeros((4, 2))
        e[k, s] = eps
        found[k, s] = (loss(Y, _class_batch(Y, o + e), C) - loss(Y, _class_batch(Y, o - e), C)) / (2 * eps)
    # Round-off 1e-16 / eps, and eps^2 times a third derivative.
    assert_allclose(gradient, found[_owned_classes(Y)], rtol=0, atol=1e-9)


# -- Tikhonov --------------------------------------------------------------------------------------------------------

NETWORKS = [("disk", "DG0", "nodes"), ("sphere", "CG1", "nodes"), ("sphere", "CG1", "basis"), ("annulus", "DG0", "basis")]
each_network = pytest.mark.parametrize("domain, element, bias", NETWORKS, ids=lambda part: part)


def _dense_squares(problem):
    """int |a|^2 dy dt, int |b|^2 dy dz dt, int |W|^2, int |mu|^2 of the dense functions."""
    net, head = problem.net, problem.head
    Y, kernel = net.Y, net.kernel.space_basis.kernel
    w, phi, psi = (gathered(Y, v) for v in (Y.weights, kernel.phi.values, kernel.psi.values))
    a2 = b2 = 0.0
    for layer, length in enumerate(np.diff(TIMES)):
        a = gathered(Y, net.bias.space_basis.expand(net.bias.get(layer)))
        b = phi @ net.kernel.get(layer) @ psi.T
        a2 += length * np.sum(w * a**2)
        b2 += length * np.einsum("y,yz,z->", w, b**2, w)
    W = head.W.get(0) @ gathered(Y, head.psi.values).T
    return a2, b2, np.sum(W**2 * w), np.sum(head.mu.get(0) ** 2)


@on_ranks
@each_network
def test_tikhonov_is_half_the_square_of_all_norms_in_label_domain_and_time(domain, element, bias):
    """(2.11), (4.6): |Y| is not 1 and the layers' lengths differ: each counts."""
    problem = learning_problem(network(domain, element, bias=bias))
    assert abs(problem.net.Y.measure - 1) > 0.5
    exact = 0.05 / 2 * sum(_dense_squares(problem))
    # Gram matrices of condition below 100.
    assert abs(tikhonov(0.05)(problem.parameters) / exact - 1) < 1e-12


@on_ranks
def test_tikhonov_of_the_bias_is_that_of_ufl():
    net = network("disk", "DG0")
    lengths = np.diff(TIMES)
    exact = sum(fd.assemble(0.3 / 2 * a**2 * fd.dx) * length for a, length in zip(net.bias.functions, lengths))
    assert abs(tikhonov(0.3)([net.bias]) / exact - 1) < ROUND_OFF


@on_ranks
@each_network
def test_gradient_of_tikhonov_is_lambda_times_the_parameters(domain, element, bias):
    """(4.7) to the letter: lambda a, lambda b, whatever the measure and the lengths of the layers."""
    problem = learning_problem(network(domain, element, bias=bias))
    with taping():
        R = tikhonov(0.05)(problem.parameters)
    derivative = ReducedFunctional(R, problem.controls()).derivative(apply_riesz=True)
    for found, m in zip(gradients(problem, derivative), gradients(problem, problem.functions)):
        assert_allclose(found, 0.05 * m, rtol=0, atol=1e-12)


class _PrintedTikhonov:
    """lambda R as printed in Remark 4.2, without 1/2, with some factor times lambda m as its gradient."""

    ready, output = True, None

    def __init__(self, parameter, weight, factor):
        self.parameter, self.weight, self.factor = parameter, weight, factor
        self.inputs = [parameter.space_basis] * len(parameter.functions)

    def forward(self, arrays, save):
        return self.weight * sum(self.parameter.inner(k, c, c) for k, c in enumerate(arrays))

    def adjoint(self, arrays, dual):
        measures, basis = self.parameter.time_basis.measures, self.parameter.space_basis
        return [dual * self.factor * self.weight * tau * basis.functional(c) for tau, c in zip(measures, arrays)]


@on_ranks
@pytest.mark.parametrize("parameter", ["bias", "kernel"])
def test_printed_regulariser_has_twice_the_printed_gradient(parameter):
    """errata (4.7): R without 1/2 fails the Taylor test with lambda a and passes it with 2 lambda a."""
    net = network("sphere", "CG1")
    parameter = getattr(net, parameter)
    rates = {}
    for factor in (1, 2):
        with taping():
            R = apply(_PrintedTikhonov(parameter, 0.05, factor), parameter.functions)[0]
        J = ReducedFunctional(R, parameter.controls())
        rates[factor] = taylor_test(J, parameter.functions, directions(J, net, [parameter]))
    assert rates[1] < 1.1, f"lambda a as the gradient of R without 1/2: R1 falls at rate {rates[1]:.3f}"
    assert rates[2] > 1.98, f"2 lambda a as the gradient of R without 1/2: R1 falls at rate {rates[2]:.3f}"


@on_ranks
def test_tikhonov_of_weight_zero_is_zero():
    net = network("disk", "DG0")
    assert tikhonov(0)(net.parameters) == 0.0
    assert tikhonov(np.float64(0.5)) == tikhonov(0.5)


# -- gradients of learning problems ----------------------------------------------------------------------------------

DOMAINS = ["disk DG0", "disk CG1", "annulus CG2", "sphere DG0", "sphere CG1", "square CG3", "cube CG1"]

#: What `learning_problem` makes: the output, the loss, the weight of Tikhonov.
KINDS = {
    "entropy, Tikhonov": dict(head=True),
    "entropy": dict(head=True, weight=None),
    "head, squares": dict(head=True, loss=least_squares, weight=None),
    "squares, Tikhonov": dict(head=False),
    "squares": dict(head=False, weight=None),
}
each_kind = pytest.mark.parametrize("kind", KINDS)

CONTROLS = {
    "a (nodes)": ("nodes", ["bias"]),
    "a (basis)": ("basis", ["bias"]),
    "beta": ("nodes", ["kernel"]),
    "W": ("nodes", ["W"]),
    "mu": ("nodes", ["mu"]),
    "f_I": ("nodes", ["f_I"]),
    "all": ("nodes", ["bias", "kernel", "W", "mu", "f_I"]),
    "all, basis": ("basis", ["bias", "kernel", "W", "mu", "f_I"]),
}


def _reduced_functional(problem, names):
    """J of the named parameters and, where it is named, of f_I; with the parameters."""
    parameters = [parameter for parameter in problem.parameters if parameter.name in names]
    with taping():
        J, _ = problem.evaluate()
    controls = [control for parameter in parameters for control in parameter.controls()]
    if "f_I" in names:
        controls.append(Control(problem.batch.inputs, riesz_map=problem.net.Y.riesz_map))
    return ReducedFunctional(J, controls), parameters


ALONE = COMM_WORLD.size == 1
#: Every kind on one domain, on every domain the two that have all terms between them; on several ranks fewer, all at once.
CASES = [
    (domain, kind, control)
    for domain in (DOMAINS if COMM_WORLD.size < 3 else ["disk DG0", "annulus CG2", "sphere CG1"])
    for kind in (KINDS if domain == "disk DG0" else ["entropy, Tikhonov", "squares"] if ALONE else ["entropy, Tikhonov"])
    for control in (CONTROLS if ALONE else ["all"])
    if KINDS[kind]["head"] or control not in ("W", "mu")
]


@on_ranks
@pytest.mark.parametrize("domain, kind, control", CASES)
def test_gradient_of_a_learning_problem(domain, kind, control, taylor):
    bias, names = CONTROLS[control]
    problem = learning_problem(network(*domain.split(), bias=bias), **KINDS[kind])
    J, parameters = _reduced_functional(problem, names)
    h = directions(J, problem.net, parameters, seed=1)
    if "f_I" in names:
        Y = problem.net.Y
        h.append(towards(J.derivative(apply_riesz=True)[-1], Y.batch(smooth(Y, 4, seed=9))))
    taylor(J, [c.control for c in J.controls], h, f"{domain}, {kind}", control)


def _one_step_networks(alone=False):
    """Explicit Euler on layers of unequal lengths, the kernel any matrix between the cells: b(y, z) is beta itself."""
    Y = label_space("disk", "DG0", alone=alone)
    net = ResidualNetwork(
        cell_indicators(Y), layers=Layers(TIMES, per_block=2), activation="tanh", solver_parameters={"ts_rk_type": "1fe"}
    )
    rng = np.random.default_rng(5)
    for layer in range(net.layers):
        net.bias.set(layer, smooth(Y, 1, seed=layer)[:, 0])
        net.kernel.set(layer, rng.normal(size=net.kernel.space_basis.shape))
    return net


@on_ranks
def test_gradients_of_explicit_euler_are_those_of_section_4():
    """(4.3), (4.4), (4.7) with the co-state at the end of the step: D_a J = sigma'(u) r + lambda a,

    D_b J = - f(z) sigma'(u) r + lambda b; and sigma' is needed in both (errata 5.1 prints sigma(u) r).
    """
    net = _one_step_networks()
    Y, weight = net.Y, 0.1
    batch = Batch(Y.batch(smooth(Y, 1)[:, 0]), Y.batch(smooth(Y, 1, seed=1)[:, 0]))
    problem = LearningProblem(net, None, least_squares, tikhonov(weight), batch)
    J, run = problem.record()
    derivative = J.derivative(apply_riesz=True)

    def order(function):
        return Y.values(function)[:, 0]

    number = np.concatenate(Y.comm.allgather(net.kernel.space_basis.kernel.phi.values.argmax(axis=1)))
    place = np.argsort(number)  # of each cell indicator in the order of all ranks' nodes

    def everywhere(values):
        return np.concatenate(Y.comm.allgather(values))[place]

    w = everywhere(Y.weights)
    for layer in range(net.layers):
        f, r = everywhere(order(run.state(layer))), everywhere(order(run.costate(layer + 1)))
        a, b = everywhere(net.bias.get(layer)), net.kernel.get(layer)
        u = a - b @ (w * f)
        slope = 1 - np.tanh(u) ** 2
        D_a, D_b = everywhere(order(derivative[layer])), net.kernel.space_basis.read(derivative[net.layers + layer])
        assert_allclose(D_a, slope * r + weight * a, rtol=0, atol=1e-12)
        assert_allclose(D_b, -np.outer(slope * r, f) + weight * b, rtol=0, atol=1e-12)
        assert np.abs(D_a - (np.tanh(u) * r + weight * a)).max() > 1e-2, "the printed form would hold"


@on_ranks
@pytest.mark.parametrize("domain, element", [("disk", "DG0"), ("sphere", "CG1"), ("square", "CG3")])
def test_terminal_costate_of_least_squares_is_what_misses_the_target(domain, element):
    """r(T) = f(T) - ftilde where J is minimised (Algorithm 2 prints the sign of maximising H), over S for a batch."""
    net = network(domain, element)
    for samples in (1, 4):
        problem = learning_problem(net, head=False, weight=None, samples=samples)
        J, run = problem.record()
        J.derivative()
        Y = net.Y
        r = (Y.values(run.final) - Y.values(problem.batch.targets)) / samples
        assert_allclose(Y.values(run.costate(net.layers)), r, rtol=0, atol=ROUND_OFF)


@on_ranks
@pytest.mark.parametrize("loss", [least_squares, cross_entropy], ids=lambda loss: loss.name)
def test_terminal_costate_of_a_head_is_the_residual_through_w(loss):
    """Remark 4.3: r(z, T) = int (C_pre - C)(y) h'(O(y)) W(y, z) dy; h' is 1, or cancels (softmax, cross entropy)."""
    net = network("sphere", "CG1")
    # As many classes as functions: with W in the wrong order of arguments all shapes would still fit.
    problem = learning_problem(net, loss=loss, weight=None)
    head = Head(polynomials(net.Y), 3, "identity" if loss is least_squares else "softmax")
    head.W.set(0, np.random.default_rng(4).normal(size=(3, 3)))
    problem = LearningProblem(net, head, loss, None, Batch(problem.batch.inputs, [0, 1, 2, 1]))
    J, run = problem.record()
    J.derivative()
    O, C = _dense_output(head, run.final), np.eye(3)[:, [0, 1, 2, 1]]
    residual = (O if loss is least_squares else softmax(O, axis=0)) - C
    r = head.psi.values @ (head.W.get(0).T @ residual) / 4
    assert_allclose(net.Y.values(run.costate(net.layers)), r, rtol=0, atol=ROUND_OFF)
    printed = head.psi.values @ (head.W.get(0) @ residual) / 4
    assert net.Y.comm.allreduce(np.abs(r - printed).max()) > 1e-2, "the order of arguments would not matter"


@on_ranks
@pytest.mark.parametrize("layer", range(len(TIMES)))
def test_costate_is_the_gradient_in_the_state_of_its_layer(layer):
    """r(t_l) represents the derivative of the rest of the network, started from f(t_l), in the label measure."""
    net = network("sphere", "CG1")
    problem = learning_problem(net, head=False, weight=None, samples=1)
    J, run = problem.record()
    J.derivative()
    state, Y = run.state(layer), net.Y
    kernel = net.kernel.space_basis.kernel
    rest = ResidualNetwork(Kernel(kernel.phi, kernel.psi), layers=np.array(TIMES[layer:]) - TIMES[layer])
    for l in range(rest.layers):
        rest.bias.set(l, net.bias.get(layer + l))
        rest.kernel.set(l, net.kernel.get(layer + l))
    J_rest = _recorded(lambda f: least_squares(Y, rest(f), problem.batch.targets), state, Y)
    gradient = J_rest.derivative(apply_riesz=True)
    assert_allclose(Y.values(run.costate(layer)), Y.values(gradient), rtol=0, atol=10 * ROUND_OFF)


# -- LearningProblem -------------------------------------------------------------------------------------------------


@on_two_ranks
@each_kind
def test_j_is_the_loss_of_the_output_and_the_regulariser(kind):
    """(2.10), (2.11)."""
    problem = learning_problem(network("disk", "DG0"), **KINDS[kind])
    net, head = problem.net, problem.head
    output, Y = net(problem.batch.inputs), net.Y
    targets = problem.batch.targets
    if head is not None:
        output, Y, targets = head(output), head.Y, head.observations(targets)
    expected = problem.loss(Y, output, targets, prediction=None if head is None else head.prediction)
    if problem.regulariser is not None:
        expected = expected + problem.regulariser(problem.parameters)
    assert problem.evaluate()[0] == expected
    assert problem.reduced_functional()(problem.functions) == expected


@on_ranks
def test_parameters_functions_and_controls_go_in_one_order():
    problem = learning_problem(network("disk", "DG0"))
    assert [p.name for p in problem.parameters] == ["bias", "kernel", "W", "mu"]
    expected = [f"{name}_{k}" for name, count in (("bias", 3), ("kernel", 3), ("W", 1), ("mu", 1)) for k in range(count)]
    assert [function.name() for function in problem.functions] == expected
    assert [control.control for control in problem.controls()] == problem.functions
    assert [p.name for p in learning_problem(network("disk", "DG0"), head=False).parameters] == ["bias", "kernel"]


@on_ranks
@pytest.mark.parametrize("annotating", [False, True])
def test_record_leaves_tape_and_annotation_as_they_were(annotating, tape):
    problem = learning_problem(network("disk", "DG0"))
    if annotating:
        with taping():
            J, _ = problem.record()
            assert annotate_tape()
    else:
        J, _ = problem.record()
        assert not annotate_tape()
    assert get_working_tape() is tape and not tape.get_blocks()
    J.derivative()
    assert get_working_tape() is tape and not tape.get_blocks()
    assert len(J.tape.get_blocks()) == 6, "expected two segments, the head, the loss, the regulariser and a sum"


@on_ranks
def test_record_leaves_tape_and_annotation_as_they_were_after_an_error(tape):
    problem = learning_problem(network("disk", "DG0"))
    problem.batch.inputs.assign(np.nan)
    with pytest.raises(ValueError, match="initial: sample 0"):
        problem.record()
    assert get_working_tape() is tape and not annotate_tape() and not tape.get_blocks()


@on_ranks
def test_evaluating_without_annotation_records_nothing(tape):
    problem = learning_problem(network("disk", "DG0"))
    problem.evaluate()
    assert not tape.get_blocks()


@on_two_ranks
@each_kind
def test_two_records_give_the_same_numbers(kind):
    problem = learning_problem(network("disk", "DG0"), **KINDS[kind])
    (first, _), (second, _) = problem.record(), problem.record()
    assert first(problem.functions) == second(problem.functions)
    derivatives = [gradients(problem, J.derivative(apply_riesz=True)) for J in (first, second)]
    for one, other in zip(*derivatives):
        assert_array_equal(one, other)


@on_two_ranks
@each_kind
def test_record_sees_parameters_that_were_changed_in_between(kind):
    problem = learning_problem(network("disk", "DG0"), **KINDS[kind])
    problem.record()
    for parameter in problem.parameters:
        parameter.set(0, 0.5 * parameter.get(0))
    expected, _ = problem.evaluate()
    J, run = problem.record()
    assert J.functional == expected
    # At the recorded point itself, without an evaluation in between.
    found = gradients(problem, J.derivative(apply_riesz=True))
    J(problem.functions)
    for one, other in zip(found, gradients(problem, J.derivative(apply_riesz=True))):
        assert_array_equal(one, other)


@on_ranks
def test_record_sees_an_initial_state_that_was_changed_in_place():
    problem = learning_problem(network("disk", "DG0"))
    before, _ = problem.record()
    value = before(problem.functions)
    inputs = problem.batch.inputs
    inputs.assign(-1 * inputs)
    expected, _ = problem.evaluate()
    assert expected != value
    J, run = problem.record()
    assert J.functional == expected
    assert J(problem.functions) == expected
    assert_array_equal(run.state(0).dat.data_ro, inputs.dat.data_ro)


@on_ranks
def test_record_does_not_see_where_an_earlier_one_was_evaluated():
    """A Taylor test or a line search leaves its tape at another point; the parameters are what counts."""
    problem = learning_problem(network("disk", "DG0"))
    expected, _ = problem.evaluate()
    first = problem.reduced_functional()
    first([function.copy(deepcopy=True).assign(2.0) for function in problem.functions])
    second = problem.reduced_functional()
    assert second.functional == expected
    assert second(problem.functions) == expected
    assert first(problem.functions) == expected, "the earlier tape stays of use"
    for one, other in zip(*(gradients(problem, J.derivative(apply_riesz=True)) for J in (first, second))):
        assert_array_equal(one, other)


@on_ranks
def test_evaluate_records_on_the_working_tape_of_a_user():
    problem = learning_problem(network("disk", "DG0"))
    with set_working_tape(Tape()) as tape, taping():
        J, run = problem.evaluate()
    found = ReducedFunctional(J, problem.controls(), tape=tape).derivative(apply_riesz=True)
    expected = problem.reduced_functional().derivative(apply_riesz=True)
    for one, other in zip(gradients(problem, found), gradients(problem, expected)):
        assert_array_equal(one, other)


@on_ranks
def test_a_network_without_layers_learns_by_its_head():
    phi = laplace("disk", "DG0", 4)
    net = ResidualNetwork(phi, layers=0)
    problem = learning_problem(net)
    J = problem.reduced_functional()
    O = _dense_output(problem.head, problem.batch.inputs)
    labels = problem.batch.targets
    fit = np.mean(logsumexp(O, axis=0) - O[labels, np.arange(4)])
    penalty = 0.05 / 2 * (np.sum(problem.head.W.get(0) ** 2) + np.sum(problem.head.mu.get(0) ** 2))
    # The Laplace basis is orthonormal to 1e-12.
    assert abs(J(problem.functions) - fit - penalty) < 1e-11
    assert len(J.derivative()) == 2


@on_ranks
@pytest.mark.parametrize("kind", ["entropy, Tikhonov", "head, squares", "squares"])
@pytest.mark.parametrize(
    "domain, bias",
    [("disk DG0", "nodes"), ("sphere CG1", "basis"), ("square CG3", "nodes"), ("cube CG1", "nodes")],
)
def test_j_and_gradient_do_not_see_the_partition(domain, bias, kind):
    """The mesh on all ranks against the whole mesh on each."""
    values, derivatives = [], []
    for alone in (False, True):
        problem = learning_problem(network(*domain.split(), bias=bias, alone=alone), **KINDS[kind])
        J = problem.reduced_functional()
        values.append(J(problem.functions))
        derivatives.append(gradients(problem, J.derivative(apply_riesz=True)))
    assert abs(values[0] / values[1] - 1) < 1e-10
    for found, expected in zip(*derivatives):
        assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@on_ranks
def test_every_rank_has_the_same_bits_of_j():
    problem = learning_problem(network("disk", "DG0"))
    value = float(problem.reduced_functional()(problem.functions))
    assert set(problem.net.Y.comm.allgather(value)) == {value}


# -- what is refused -------------------------------------------------------------------------------------------------


@on_two_ranks
@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1, 5, 7], r"^batch.targets: expected classes 0 to 2, got 5 for sample 2$"),
        ([0, -1, 1, 2], r"^batch.targets: expected classes 0 to 2, got -1 for sample 1$"),
        ([], r"^targets: expected integers of shape \(4,\), got shape \(0,\)$"),
        (np.zeros(0, dtype=int), r"^targets: expected integers of shape \(4,\), got shape \(0,\)$"),
        ([0.0, 1.0, 2.0, 1.0], r"^targets: expected integers of shape \(4,\), got list with entries of type float64$"),
        ([[0, 1, 2, 1]], r"^targets: expected integers of shape \(4,\), got shape \(1, 4\)$"),
        (["a", "b", "c", "a"], r"^targets: expected integers of shape \(4,\), got list with entries of type <U1$"),
        (1, r"^targets: expected integers of shape \(4,\), got shape \(\)$"),
        (
            [True, False, True, True],
            r"^targets: expected integers of shape \(4,\), got list with entries of type bool$",
        ),
        ([0, 1, 2], r"^targets: expected integers of shape \(4,\), got shape \(3,\)$"),
        ([0, 1, 2, 0, 1], r"^targets: expected integers of shape \(4,\), got shape \(5,\)$"),
    ],
)
def test_refuses_labels(labels, message):
    problem = learning_problem(network("disk", "DG0"))
    with pytest.raises((TypeError, ValueError), match=message):
        LearningProblem(problem.net, problem.head, cross_entropy, None, Batch(problem.batch.inputs, labels))


def _parts():
    problem = learning_problem(network("disk", "DG0"))
    return dict(net=problem.net, head=problem.head, loss=cross_entropy, regulariser=tikhonov(1e-3), batch=problem.batch)


@on_two_ranks
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(net="net"), TypeError, r"^net: expected a ResidualNetwork, got str$"),
        (dict(loss="cross_entropy"), TypeError, r"^loss: expected a Loss, got str$"),
        (dict(loss=lambda Y, O, C: 0.0), TypeError, r"^loss: expected a Loss, got function$"),
        (dict(batch=([0], [1])), TypeError, r"^batch: expected a Batch, got tuple$"),
        (dict(head="softmax"), TypeError, r"^head: expected a Head or None, got str"),
        (dict(head=3), TypeError, r"^head: expected a Head or None, got int"),
        (dict(regulariser=1e-3), TypeError, r"^regulariser: expected a Regulariser or None, got float"),
        (dict(regulariser=tikhonov), TypeError, r"^regulariser: expected a Regulariser or None, got function"),
    ],
)
def test_refuses_parts_of_the_wrong_type(change, error, message):
    with pytest.raises(error, match=message):
        LearningProblem(**_parts() | change)


@on_ranks
def test_refuses_a_head_of_another_label_space():
    with pytest.raises(
        ValueError, match=r"^head: expected one that reads the network's label space .*, got one that reads .*$"
    ):
        LearningProblem(**_parts() | dict(head=_head("sphere", "CG1")))


@on_ranks
def test_refuses_inputs_that_do_not_fit():
    parts = _parts()
    net, head = parts["net"], parts["head"]
    labels = [0, 1, 2]
    elsewhere = fd.Function(label_space("sphere", "CG1").batch_space(SAMPLES))
    other = fd.Function(fd.VectorFunctionSpace(net.Y.V.mesh(), "CG", 1, dim=SAMPLES))
    ill = net.Y.batch(smooth(net.Y))
    values = ill.dat.data_wo
    if values.size:
        values[-1, 1] = np.inf
    for inputs, error, message in [
        (smooth(net.Y), TypeError, "^inputs: expected a Function, got ndarray; Y.batch"),
        (elsewhere, ValueError, "^batch.inputs: expected a Function on the mesh .*, got one on"),
        (other, ValueError, "^batch.inputs: expected a Function of .* or a batch of it .*, got one of"),
        (ill, ValueError, r"^batch.inputs: sample 1 has values that are not finite \(1 samples have\)$"),
    ]:
        with pytest.raises(error, match=message):
            LearningProblem(net, head, cross_entropy, None, Batch(inputs, labels))


@on_ranks
def test_refuses_targets_that_do_not_fit():
    parts = _parts()
    net, head, inputs = parts["net"], parts["head"], parts["batch"].inputs
    nan = fd.Function(net.Y.batch_space(4))
    nan.dat.data_wo[:, 2] = np.nan
    for head, targets, error, message in [
        (
            None,
            [0, 1, 2, 0],
            ValueError,
            "^head: expected a Head onto classes, as the batch has class labels, got None; give Head",
        ),
        (None, net.Y.batch(smooth(net.Y, 3)), ValueError, "^batch.targets: expected 4 samples, .*, got 3$"),
        (None, nan, ValueError, "^batch.targets: sample 2 has values that are not finite"),
        (head, net.Y.batch(smooth(net.Y, 4)), ValueError, "^batch.targets: expected a Function on the mesh"),
    ]:
        with pytest.raises(error, match=message):
            LearningProblem(net, head, least_squares, None, Batch(inputs, targets))


@on_ranks
def test_takes_a_batch_of_targets_for_a_head():
    parts = _parts()
    labels, head = parts["batch"].targets, parts["head"]
    by_labels = LearningProblem(**parts).evaluate()[0]
    observed = Batch(parts["batch"].inputs, head.observations(labels))
    assert LearningProblem(**parts | dict(batch=observed)).evaluate()[0] == by_labels


@on_two_ranks
@pytest.mark.parametrize(
    "psi, classes, error, message",
    [
        (None, 3, TypeError, r"^psi: expected a Basis, got NoneType; laplace_basis"),
        (np.ones((4, 2)), 3, TypeError, r"^psi: expected a Basis, got ndarray; laplace_basis"),
        ("laplace", 0, ValueError, r"^onto: expected a positive integer, got 0$"),
        ("laplace", 2.0, ValueError, r"^onto: expected a positive integer, got 2.0$"),
        ("laplace", None, ValueError, r"^onto: expected a positive integer, got None$"),
    ],
)
def test_head_refuses(psi, classes, error, message):
    psi = laplace("disk", "DG0", 4) if isinstance(psi, str) else psi
    with pytest.raises(error, match=message):
        Head(psi, classes)


@on_two_ranks
@pytest.mark.parametrize("verb", ["__call__", "scores"])
def test_head_refuses_states_that_do_not_fit(verb):
    head = _head()
    nan = head.psi.Y.batch(smooth(head.psi.Y))
    nan.dat.data_wo[:, 1:] = np.nan
    for f, error, message in [
        (smooth(head.psi.Y), TypeError, "^f: expected a Function, got ndarray$"),
        (fd.Function(label_space("sphere", "CG1").V), ValueError, "^f: expected a Function on the mesh"),
        (fd.Function(label_space("disk", "DG0").V), ValueError, "^f: expected a Function of .*, got one of"),
        (nan, ValueError, r"^f: sample 1 has values that are not finite \(2 samples have\)$"),
    ]:
        with pytest.raises(error, match=message):
            getattr(head, verb)(f)


@on_two_ranks
@pytest.mark.parametrize("weight", [-1e-3, np.nan, np.inf, "1e-3", None, [1e-3], 1j], ids=str)
def test_regularisers_refuse_what_is_no_number_from_zero_up(weight):
    for make in (tikhonov, smooth_in_space, smooth_in_time):
        with pytest.raises(ValueError, match=r"^weight: expected a number >= 0, got .*$"):
            make(weight)


@on_ranks
def test_a_users_own_loss_is_a_loss(taylor):
    """int sqrt(1 + |h(O) - C|^2) - 1 dy, by hand."""
    smooth_absolute = Loss(
        "smooth absolute value",
        lambda Y, O, C, h: Y.weights @ (np.sqrt(1 + (h.value(Y, O) - C) ** 2) - 1),
        lambda Y, O, C, h: h.transpose(Y, O, Y.weights[:, None] * (h.value(Y, O) - C) / np.sqrt(1 + (h.value(Y, O) - C) ** 2)),
    )
    problem = learning_problem(network("disk", "DG0"), loss=smooth_absolute)
    J = problem.reduced_functional()
    h = directions(J, problem.net, problem.parameters)
    taylor(J, problem.functions, h, "disk DG0, a user's loss", "all")
