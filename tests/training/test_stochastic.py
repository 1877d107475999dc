"""Stochastic gradients: the iterates of formulas written out in NumPy, on any number of ranks; early stopping; schedules."""

import numpy as np
import pytest
from firedrake import COMM_WORLD
from helpers import flat_network, label_space, laplace, set_smooth, smooth
from numpy.testing import assert_allclose, assert_array_equal
from problems import coefficients, failing_at, learning_problem, network, polynomials

from fem_resnet import SGD, Adam, Batch, LearningProblem, least_squares, tikhonov, train, train_stochastic
from fem_resnet.time_stepping.stepper import StepFailure

on_ranks = pytest.mark.parallel([1, 2, 3])
RATE, EPOCHS, SIZE, SAMPLES = 0.05, 3, 3, 7
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.5, 1.0])


def silent(progress):
    pass


def linear_problem(alone=False, bias="nodes", weight=0.1):
    """f(1) = f + a - B f by one step of Euler: J is quadratic, and strictly convex by its regulariser. Gram matrices matter."""
    phi = laplace("annulus", "CG1", 5, alone)
    psi = polynomials(phi.Y)
    net = flat_network(
        phi, psi, bias=psi if bias == "basis" else None, layers=1, final_time=0.8, activation="identity",
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
    )  # fmt: skip
    set_smooth(net, np.random.default_rng(0), 0.3)
    Y = net.Y
    batch = Batch(Y.batch(smooth(Y, SAMPLES + 1)), Y.batch(smooth(Y, SAMPLES + 1, seed=9)), WEIGHTS)
    return LearningProblem(net, None, least_squares, tikhonov(weight), batch)


class Written:
    """The same problem and the same steps, written out: no tape, no function of the package but sums over Y."""

    def __init__(self, problem, step, weight=0.1):
        net, self.step, self.weight = problem.net, step, weight
        self.Y, self.T = net.Y, 0.8
        self.phi, self.psi = net.bases["phi"][0].values, net.bases["psi"][0].values
        self.basis = None if net.bases["bias"][0] is None else net.bases["bias"][0].values
        self.a, self.beta = net.bias.get(0), net.kernel.get(0)
        self.w = self.Y.weights[:, None]
        self.f, self.C = self.Y.values(problem.batch.inputs).copy(), self.Y.values(problem.batch.targets).copy()
        shapes = [self.a.shape, self.beta.shape]
        self.first, self.second = ([np.zeros(shape) for shape in shapes] for _ in range(2))
        self.number = 0

    def gram(self, P, Q=None):
        return self.Y.sum(P.T @ (self.w * (P if Q is None else Q)))

    def riesz(self, chosen, omega):
        """Gradients in L2(Y x (0, T)) and L2(Y x Y x (0, T)); J itself too."""
        f, C, omega = self.f[:, chosen], self.C[:, chosen], omega / omega.sum()
        a = self.a if self.basis is None else self.basis @ self.a
        g = self.gram(self.psi, f)
        error = f + self.T * (a[:, None] - self.phi @ self.beta @ g) - C
        G = self.gram(self.phi), self.gram(self.psi)
        J = self.Y.sum(np.sum(omega * self.w * error**2)) / 2
        J += self.weight / 2 * self.T * self.Y.sum(np.sum(self.w[:, 0] * a**2))
        J += self.weight / 2 * self.T * np.trace(self.beta.T @ G[0] @ self.beta @ G[1])
        in_a = error @ omega  # times T, and over the measure T of the layer
        if self.basis is not None:
            in_a = np.linalg.solve(self.gram(self.basis), self.gram(self.basis, in_a[:, None])[:, 0])
        in_beta = -np.linalg.solve(G[0], self.gram(self.phi, error) @ (omega[:, None] * g.T)) @ np.linalg.inv(G[1])
        return J, [in_a + self.weight * self.a, in_beta + self.weight * self.beta]

    def coordinates(self):
        """For bias and kernel: into coordinates, back, and the factor of the gradient."""
        L = [np.linalg.cholesky(self.gram(P)).T for P in (self.phi, self.psi)]
        area = self.Y.measure
        into, back = lambda c: c, lambda x: x
        if self.basis is not None:
            R = np.linalg.cholesky(self.gram(self.basis)).T
            into, back = lambda c: R @ c / area**0.5, lambda x: np.linalg.solve(R, x) * area**0.5
        return [
            (into, back, area),
            (lambda c: L[0] @ c @ L[1].T, lambda x: np.linalg.solve(L[1], np.linalg.solve(L[0], x).T).T, 1.0),
        ]

    def move(self, chosen, omega, rate):
        J, gradients = self.riesz(chosen, omega)
        self.number += 1
        step, moved = self.step, []
        for c, r, m, v, (into, back, unit) in zip(
            (self.a, self.beta), gradients, self.first, self.second, self.coordinates()
        ):
            c = (1 - rate * step.decay) * c
            if isinstance(step, SGD):
                m[...] = step.momentum * m + r
                moved.append(c - rate * m)
                continue
            g = unit * into(r)
            m[...] = step.beta_1 * m + (1 - step.beta_1) * g
            v[...] = step.beta_2 * v + (1 - step.beta_2) * g**2
            root = np.sqrt(v / (1 - step.beta_2**self.number)) + step.epsilon
            moved.append(back(into(c) - rate * m / (1 - step.beta_1**self.number) / root))
        self.a, self.beta = moved
        return J


STEPS = {
    "SGD": SGD(RATE, momentum=0.0),
    "momentum": SGD(RATE, momentum=0.7, decay=0.1),
    "Adam": Adam(RATE, beta_2=0.9),
    "AdamW": Adam(RATE, decay=0.2, epsilon=1e-3),
}


@on_ranks
@pytest.mark.parametrize("bias", ["nodes", "basis"])
@pytest.mark.parametrize("step", STEPS)
def test_the_iterates_are_those_of_formulas_written_out(step, bias):
    """On an annulus, |Y| = 2.6; a sample of weight 0 is in no batch; the last batch of an epoch has one sample."""
    problem = linear_problem(bias=bias)
    written, random, values = Written(problem, STEPS[step]), np.random.default_rng(4), []
    rates = RATE * (1 + np.cos(np.pi * np.arange(9) / 9)) / 2
    for epoch in range(EPOCHS):
        order = np.random.default_rng(int(random.integers(2**31))).permutation(SAMPLES + 1)
        order, parts = order[WEIGHTS[order] > 0], []
        for n, start in enumerate(range(0, SAMPLES, SIZE)):
            chosen = order[start : start + SIZE]
            parts.append((written.move(chosen, WEIGHTS[chosen], rates[3 * epoch + n]), WEIGHTS[chosen].sum()))
        values.append(np.average(*np.transpose(parts)[:1], weights=np.transpose(parts)[1]))
    result = train_stochastic(problem, STEPS[step], batch_size=SIZE, epochs=EPOCHS, seed=4, monitor=silent)
    assert (result.steps, result.epochs, result.best, result.reason) == (9, 3, 3, "EPOCHS")
    assert_allclose(result.rates, rates, rtol=1e-14)
    assert_allclose(result.values[1:], values, rtol=1e-12)
    for found, expected in zip(result.controls, (written.a, written.beta)):
        assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    for parameter, reached in zip(problem.parameters, result.controls):
        assert_array_equal(parameter.get(0), reached)
    assert_allclose(result.value, problem.evaluate()[0], rtol=1e-13)
