r"""A term of an equation, learned from its solutions
=================================================

Plants spread over a plate with three holes, die, come from seeds, and are shaded by those that grow in the south of them:

    -div(kappa grad u) + u + N(u) = g,     no flow through the edges,     N(u)(y) = 9 u(y) S(y) / (1 + 0.9 S(y)),

where S(y) = int k(y, z) u(z) dz, and k is a Gaussian about the place 0.3 south of y. N is nonlinear, and nonlocal. It is not
known: it is to be learned from 100 pairs (g, u), with noise of one per cent in u. What the known terms leave over of a pair
is N(u), in weak form. So a network is trained from u to that, a function to a function, and then put into the residual of the
equation by `network_operator`. Firedrake solves it for new g by Newton's method, and pyadjoint differentiates the solution.

Beside it stand terms that are fitted to the same residuals: c u; a cubic polynomial in u(y); the best linear map; and kernel
ridge regression, a nonlinear map too. All but the local ones see and give 40 eigenfunctions of the Laplacian on the plate. A
term that was learned in one equation is of use in another one: with half of kappa, and with g twice as large. Run

    containers/run python demos/closure.py            (three minutes; --short for 15 s)

It writes a table and a figure to demos/output/. Local terms leave 25 % of u wrong, the best linear map 6 %, the network 1.3 %;
kernel ridge comes near it with 1.5 %. Half of what the network leaves, these 40 functions do not hold.
"""

import logging
import sys
import time
from pathlib import Path

SHORT = "--short" in sys.argv
sys.argv = [argument for argument in sys.argv if argument != "--short"]  # PETSc would take it for an option of its own

import firedrake as fd
import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg
from firedrake.adjoint import ReducedFunctional, continue_annotation, pause_annotation, taylor_test
from matplotlib.figure import Figure
from mpi4py import MPI
from scipy.spatial import cKDTree

from fem_resnet import (
    Batch,
    Head,
    LabelSpace,
    LearningProblem,
    ResidualNetwork,
    laplace_basis,
    least_squares,
    network_operator,
    plot,
    read_mesh,
    tikhonov,
    train,
)  # fmt: skip

NOTE = """\
Mean relative errors of 20 samples an equation, from one training. The best linear map and kernel ridge see and give the same
40 functions as the network, with weights chosen on a fifth of the training samples, as its own one is. Two layers and
softplus were chosen among 1, 2, 4 and softplus, tanh on test samples of another seed. N(u) itself, laid into these
functions, is what is left of the error if all else is right. Network and kernel ridge differ by little, and other draws of
training samples and starts were not tried. The last row learns u from g without an equation: it does not know of half of
kappa.
"""

PLATE = Path(__file__).parents[1] / "meshes" / "plate.msh"
KAPPA, BETA, ALPHA = 0.05, 9.0, 0.9
SOUTH, WIDTH = 0.3, 0.25
NOISE = 0.01

# %% The data
# Solutions are made on the mesh twice as fine, 2,319 nodes, with sums over the nodes for all integrals but that of the
# gradients. What is learned from them has their values at the 611 nodes of the mesh itself.


def sparse(form):
    """The matrix of a form."""
    matrix = fd.assemble(form).petscmat
    rows, columns, values = matrix.getValuesCSR()
    return scipy.sparse.csr_matrix((values, columns, rows), shape=matrix.size)


def forcings(places, number, seed):
    """g at places, one a column: exponentials of Gaussian fields with waves of length 0.5 and more, some large, some small."""
    random = np.random.default_rng(seed)
    waves, phases = random.normal(size=(number, 40, 2)) / 0.35, random.uniform(0, 2 * np.pi, (number, 40))
    fields = np.cos(np.einsum("nwx,px->pnw", waves, places) + phases).sum(axis=2) * (0.7 * (2 / 40) ** 0.5)
    return 0.7 * np.exp(fields + 0.4 * random.normal(size=number))


class Shade:
    """The term N itself, at nodes with weights."""

    def __init__(self, places, weights):
        apart = places[:, None] - [0.0, SOUTH] - places
        self.matrix = np.exp(-(apart**2).sum(axis=2) / WIDTH**2) / (np.pi * WIDTH**2) * weights

    def __call__(self, u):
        S = self.matrix @ u
        return BETA * u * S / (1 + ALPHA * S)

    def slopes(self, u):
        """N'(u) v = first v + second (K v)."""
        S = self.matrix @ u
        return BETA * S / (1 + ALPHA * S), BETA * u / (1 + ALPHA * S) ** 2


class Plate:
    """A mesh of the plate on one rank, where solutions are made; rank 0 alone has it."""

    def __init__(self, refinements):
        V = fd.FunctionSpace(fd.MeshHierarchy(read_mesh(PLATE, fd.COMM_SELF), refinements)[-1], "CG", 1)
        Y = LabelSpace(V)
        u, v = fd.TrialFunction(V), fd.TestFunction(V)
        self.places, self.weights = Y.coordinates, Y.weights
        self.stiffness, self.term = sparse(fd.inner(fd.grad(u), fd.grad(v)) * fd.dx), Shade(Y.coordinates, Y.weights)

    def solve(self, g, kappa):
        """u by Newton's method; the part of N' that is not at y itself is left to GMRES."""
        known, w = kappa * self.stiffness + scipy.sparse.diags(self.weights), self.weights
        u = scipy.sparse.linalg.spsolve((known + scipy.sparse.diags(w * BETA / ALPHA / 2)).tocsc(), w * g)
        for _ in range(20):
            residual = known @ u + w * (self.term(u) - g)
            here, there = self.term.slopes(u)
            near = (known + scipy.sparse.diags(w * here)).tocsc()
            slope = scipy.sparse.linalg.LinearOperator(near.shape, lambda v: near @ v + w * there * (self.term.matrix @ v))
            inverse = scipy.sparse.linalg.LinearOperator(near.shape, scipy.sparse.linalg.splu(near).solve)
            step, _ = scipy.sparse.linalg.gmres(slope, residual, rtol=1e-3, M=inverse)
            u -= step
            if np.abs(step).max() < 1e-6 * np.abs(u).max():
                return u
        raise ArithmeticError("the true equation was not solved")


class Data:
    """g, u and N(u) by name: values at all nodes of the finer mesh, the same on all ranks. `places` has these nodes."""

    def __init__(self, train, test, refinements):
        made = self._made(train, test, refinements) if fd.COMM_WORLD.rank == 0 else None
        self.places, self.pairs = fd.COMM_WORLD.bcast(made)

    @staticmethod
    def _made(number, tests, refinements):
        plate, pairs = Plate(refinements), {}
        for name, count, seed, kappa, factor in (
            ("train", number, 0, KAPPA, 1), ("as in training", tests, 7, KAPPA, 1), ("half of kappa", tests, 7, KAPPA / 2, 1),
            ("twice g", tests, 7, KAPPA, 2),
        ):  # fmt: skip
            g = factor * forcings(plate.places, count, seed)
            u = np.column_stack([plate.solve(each, kappa) for each in g.T])
            N = plate.term(u)
            if name == "train":
                size = np.sqrt(plate.weights @ u**2 / plate.weights.sum())
                u += NOISE * size * np.random.default_rng(2).normal(size=u.shape)
            pairs[name] = g, u, N
        return plate.places, pairs

    def at(self, Y, name):
        """g, u and N(u) at the nodes of a mesh, all of which are nodes here."""
        apart, numbers = cKDTree(self.places).query(Y.coordinates)
        assert apart.max(initial=0.0) < 1e-10
        return tuple(values[numbers] for values in self.pairs[name])


#: The equations in which terms are tested, and their kappa.
TESTS = {"as in training": KAPPA, "half of kappa": KAPPA / 2, "twice g": KAPPA}


# %% The equation
# With a term in UFL. `nodes` is the measure of sums over the nodes.

nodes = fd.dx(degree=1, scheme="KMV")
DIRECT = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}


class Equation:
    """The known terms on a mesh, with a given g, and any other term."""

    def __init__(self, Y):
        self.Y, self.kappa = Y, fd.Constant(KAPPA)
        self.u, self.g = fd.Function(Y.V), fd.Function(Y.V)
        v = fd.TestFunction(Y.V)
        self.known = self.kappa * fd.inner(fd.grad(self.u), fd.grad(v)) * fd.dx + (self.u - self.g) * v * nodes
        self.v = v

    def residuals(self, g, u):
        """What the known terms leave over for N(u): Riesz representatives of the weak residuals, shape (nodes, samples)."""
        return np.column_stack([self._residual(*pair) for pair in zip(g.T, u.T)])

    def _residual(self, g, u):
        self.Y.write(self.g, g[:, None])
        self.Y.write(self.u, u[:, None])
        return -self.Y.values(self.Y.riesz_map(fd.assemble(self.known)))[:, 0]

    def solver(self, term=0):
        """A function of g and kappa, with a term in UFL: u, and norms of Newton's residuals from 0. No u if it fails.

        N' of a network has the rank of the bases: it stays a map, and the known terms precondition.
        """
        free = {"mat_type": "matfree", "pmat_type": "aij", "ksp_type": "gmres", "ksp_rtol": 1e-10, "pc_type": "lu"}
        free |= {"pc_factor_mat_solver_type": "mumps", "snes_rtol": 1e-10, "snes_stol": 0, "snes_max_it": 30}
        F = self.known + (term * self.v * nodes if term else 0)
        problem = fd.NonlinearVariationalProblem(F, self.u, Jp=fd.derivative(self.known, self.u))
        solver = fd.NonlinearVariationalSolver(problem, solver_parameters=free)
        solver.snes.setConvergenceHistory(reset=True)

        def solve(g, kappa):
            self.kappa.assign(kappa)
            self.Y.write(self.g, g[:, None])
            self.u.assign(0)
            try:
                solver.solve()
            except fd.ConvergenceError:
                return None, []
            return self.Y.values(self.u)[:, 0].copy(), solver.snes.getConvergenceHistory()[0]

        return solve


# %% What is learned
# All fits see relative errors: a sample has the weight 1 / |r|^2. Weights of ridges, the width of the kernel and Tikhonov's
# weight are those that are best on a fifth of the samples when the others are learned from.

RANK, LAYERS, FINAL_TIME, ITERATIONS = 40, 2, 2.0, 300
WEIGHTS = (1e-7, 1e-6, 1e-5)
RIDGES = np.logspace(-11, -1, 11)
WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)


def best(settings, fit, error, count):
    """What is fitted to all samples with the settings that are best on every fifth one, and these settings."""
    held = np.arange(count) % 5 == 0
    chosen = min(settings, key=lambda each: error(fit(each, ~held), held))
    return fit(chosen, np.ones(count, bool)), chosen


def local(u, r, weights, degree):
    """Coefficients c of c_1 u + c_2 u^2 + .. at the nodes, by least squares with these weights, of all ranks."""
    powers = np.stack([u**k for k in range(1, degree + 1)])
    gram, right = np.einsum("ins,jns,ns->ij", powers, powers, weights), np.einsum("ins,ns,ns->i", powers, r, weights)
    both = fd.COMM_WORLD.allreduce(np.column_stack([gram, right]))
    return np.linalg.solve(both[:, :-1], both[:, -1])


def linear(p, q, weights, ridge):
    """q as a linear function of p and a constant; columns are samples."""
    middle, onto = (np.average(x, axis=1, weights=weights)[:, None] for x in (p, q))
    left = (p - middle) * weights
    matrix = np.linalg.solve(
        left @ (p - middle).T / weights.sum() + ridge * np.eye(len(p)), left @ (q - onto).T / weights.sum()
    ).T
    return lambda p: onto + matrix @ (p - middle)


def kernel_ridge(p, q, weights, width, ridge):
    """q as a sum of Gaussians about the samples of p."""

    def gaussians(x):
        return np.exp(-((x[:, :, None] - p[:, None]) ** 2).sum(axis=0) / width**2)

    c = np.linalg.solve(gaussians(p) + ridge * np.diag(weights.mean() / weights), q.T)
    return lambda p: (gaussians(p) @ c).T


def network(phi):
    """The network and the head onto the same functions."""
    net = ResidualNetwork(
        phi, bias=phi, layers=LAYERS, final_time=FINAL_TIME, activation="softplus",
        solver_parameters={"ts_type": "rk", "ts_rk_type": "1fe"},
    )  # fmt: skip
    net.start("random smooth", 0, gain=0.3)
    for layer in range(LAYERS):
        net.kernel.set(layer, net.kernel.get(layer) - np.eye(phi.rank))
    return net, Head(phi, phi, "identity")


def learn(phi, u, r, weights, weight, iterations):
    """The trained network and head; samples are columns."""
    net, head = network(phi)
    batch = Batch(phi.Y.batch(u), phi.Y.batch(r), weights.tolist())
    problem = LearningProblem(net, head, least_squares, tikhonov(weight), batch)
    train(problem, {"tao_type": "bqnls", "tao_max_it": iterations}, eliminate="head", quiet=True)
    return net, head


class Terms:
    """All terms, fitted to training pairs on one mesh.

    `local` has the coefficients of the local ones, `maps` functions from coefficients of u to coefficients of N(u), `net` and
    `head` are the network, and `weight` is Tikhonov's. `direct` is a map from coefficients of g to those of u: it knows
    neither the equation nor kappa.
    """

    def __init__(self, equation, g, u, rank, iterations, weights):
        self.phi = phi = laplace_basis(equation.Y, rank)
        p, q, f = (phi.project(each) for each in (u, equation.residuals(g, u), g))
        relative, count = 1 / (q**2).sum(axis=0), len(q.T)
        r = phi.values @ q
        self.local = {degree: local(u, r, equation.Y.weights[:, None] * relative, degree) for degree in (1, 3)}
        linears, kernels = [(ridge,) for ridge in RIDGES], [(width, ridge) for width in WIDTHS for ridge in RIDGES]

        def a_map(settings, fit, x, y, relative):
            def on(each, some):
                return fit(x[:, some], y[:, some], relative[some], *each)

            def missed(found, some):
                return np.sqrt(((found(x[:, some]) - y[:, some]) ** 2).sum(axis=0) * relative[some]).mean()

            return best(settings, on, missed, count)[0]

        self.maps = {
            "linear map": a_map(linears, linear, p, q, relative),
            "kernel ridge": a_map(kernels, kernel_ridge, p, q, relative),
        }
        self.direct = a_map(kernels, kernel_ridge, f, p, 1 / (p**2).sum(axis=0))

        def trained(weight, some):
            return learn(phi, u[:, some], r[:, some], relative[some], weight, iterations)

        def missed(found, some):
            apart = phi.project(outputs(*found, u[:, some])) - q[:, some]
            return np.sqrt((apart**2).sum(axis=0) * relative[some]).mean()

        (self.net, self.head), self.weight = best(weights, trained, missed, count)


def outputs(net, head, u):
    """What the network says of functions, one a column."""
    return head.Y.values(head(net(net.Y.batch(u))))


# %% What they come to
# A term that sees and gives coefficients in eigenfunctions needs no solver for functions: with f those of g, those of u solve
# (1 + kappa lambda) p + N(p) = f. So are the rows solved that have neither a network nor a local term.


def by_coefficients(term, phi, f, kappa):
    """The coefficients of u for those of g, from two starts; None where the solver fails."""
    slopes = 1 + kappa * phi.eigenvalues

    def residual(p):
        return p - (f - term(p[:, None])[:, 0]) / slopes

    for start in (0 * f, f / slopes):
        found = scipy.optimize.root(residual, start, tol=1e-10).x
        if np.linalg.norm(residual(found)) < 1e-8 * np.linalg.norm(f):
            return found
    return None


class Errors:
    """Errors of N(u), and of solutions in each equation, by the name of the term: lists of relative errors in L2, by sample.

    A solution that was not found has the error infinity.
    """

    def __init__(self, data, equation):
        self.equation, self.Y = equation, equation.Y
        self.tests = {name: data.at(self.Y, name) for name in TESTS}
        self.of_N, self.of_u, self.norms = {}, {}, []
        solver = equation.solver()
        self.plain = {name: [solver(g, TESTS[name])[0] for g in self.tests[name][0].T] for name in TESTS}

    def relative(self, found, true):
        """Of columns."""
        squares = self.Y.sum(np.stack([self.Y.weights @ (found - true) ** 2, self.Y.weights @ true**2]))
        return np.sqrt(squares[0] / squares[1])

    def add(self, name, term, solve):
        """Of a term: its values for columns of u, and a solution from (test, sample, g, kappa)."""
        _, u, N = self.tests["as in training"]
        self.of_N[name] = None if term is None else self.relative(term(u), N)
        self.of_u[name] = {test: self._solved(solve, test) for test in TESTS}

    def _solved(self, solve, test):
        g, u, _ = self.tests[test]
        found = [solve(test, k, g[:, k], TESTS[test]) for k in range(len(g.T))]
        errors = [np.inf if one is None else self.relative(one[:, None], u[:, k : k + 1])[0] for k, one in enumerate(found)]
        return np.array(errors)

    def in_ufl(self, name, term, values):
        """Of a term in UFL."""
        solver = self.equation.solver(term)

        def solve(test, k, g, kappa):
            u, norms = solver(g, kappa)
            if name.startswith("network"):
                self.norms.append(norms)
            return u

        self.add(name, values, solve)

    def of_map(self, name, phi, term):
        """Of a map from coefficients to coefficients."""

        def solve(test, k, g, kappa):
            p = by_coefficients(term, phi, phi.project(g[:, None])[:, 0], kappa)
            plain = self.plain[test][k]
            return None if p is None else plain + phi.values @ (p - phi.project(plain[:, None])[:, 0])

        self.add(name, lambda u: phi.values @ term(phi.project(u)), solve)

    def of_terms(self, terms):
        """Of all of them."""
        phi, u = terms.phi, self.equation.u
        self.in_ufl("no term", 0, np.zeros_like)
        for degree, c in terms.local.items():

            def polynomial(u, c=c):
                return sum(each * u ** (k + 1) for k, each in enumerate(c))

            self.in_ufl("c u" if degree == 1 else "cubic polynomial in u(y)", polynomial(u), polynomial)
        for name, term in terms.maps.items():
            self.of_map(name, phi, term)
        self.of_network("network", terms.net, terms.head)

        def nothing_but_projected(test, k, g, kappa):
            q = phi.project(self.tests[test][2][:, k : k + 1])[:, 0]
            return self.plain[test][k] - phi.values @ (q / (1 + kappa * phi.eigenvalues))

        _, _, N = self.tests["as in training"]
        self.add("N(u) itself, in these functions", lambda u: phi.values @ phi.project(N), nothing_but_projected)
        self.add(
            "no equation: kernel ridge from g to u", None,
            lambda test, k, g, kappa: phi.values @ terms.direct(phi.project(g[:, None]))[:, 0],
        )  # fmt: skip

    def of_network(self, name, net, head):
        """Of a network on this mesh."""
        self.in_ufl(name, network_operator(net, self.equation.u, head), lambda u: outputs(net, head, u))

    def mean(self, name, test):
        """Of the solutions that were found, and how many were not."""
        errors = self.of_u[name][test]
        there = np.isfinite(errors)
        return float(errors[there].mean()) if there.any() else np.inf, int((~there).sum())

    def rows(self):
        """Markdown."""
        yield "| relative error in L2, % | N(u) | " + " | ".join(f"u, {test}" for test in TESTS) + " |"
        yield "|---" * (2 + len(TESTS)) + "|"
        for name, of_N in self.of_N.items():
            cells = ["" if of_N is None else f"{100 * of_N.mean():.1f}"]
            for mean, missing in (self.mean(name, test) for test in TESTS):
                cells.append(f"{100 * mean:.2f}" + (f", {missing} of {self.count} not found" if missing else ""))
            yield f"| {name} | " + " | ".join(cells) + " |"

    @property
    def count(self):
        """Samples a test."""
        return len(self.tests["as in training"][0].T)


def newton_order(norms):
    """The order of the last steps of Newton's method above round-off: log |F_2 / F_1| / log |F_1 / F_0|."""
    kept = [norm for norm in norms if norm > 1e-9 * norms[0]]
    return np.log(kept[-1] / kept[-2]) / np.log(kept[-2] / kept[-3])


def rate_through_the_solve(equation, terms, g, u):
    """Of Taylor's remainder of the misfit of a solution, in all that network and head learn."""
    net, head, Y = terms.net, terms.head, equation.Y
    for array, function in ((g, equation.g), (u, target := fd.Function(Y.V))):
        Y.write(function, array[:, None])
    equation.kappa.assign(KAPPA)
    continue_annotation()
    found = fd.Function(Y.V)
    F = fd.replace(equation.known, {equation.u: found}) + network_operator(net, found, head) * equation.v * nodes
    fd.solve(F == 0, found, solver_parameters=DIRECT | {"snes_rtol": 1e-12})
    J = fd.assemble((found - target) ** 2 * nodes)
    pause_annotation()
    controls = [control for parameter in (*net.parameters, *head.parameters) for control in parameter.controls()]
    point = [control.control.copy(deepcopy=True) for control in controls]
    return taylor_test(ReducedFunctional(J, controls), point, [fd.Function(p).assign(0.1 * p) for p in point])


# %% All together


def draw(path, errors, net, head):
    """A test sample: g, u, the term and the network's, and how far it is off."""
    Y = errors.Y
    g, u, N = (values[:, :1] for values in errors.tests["as in training"])
    found = outputs(net, head, u)
    figure = Figure(figsize=(17, 3), layout="constrained")
    low, high = (float(Y.comm.allreduce(x, op=op)) for x, op in ((N.min(), MPI.MIN), (N.max(), MPI.MAX)))
    off = float(Y.comm.allreduce(np.abs(found - N).max(), op=MPI.MAX))
    shown = [("g", g, None), ("u", u, None), ("N(u)", N, (low, high)), ("N(u) of the network", found, (low, high))]
    for ax, (title, values, limits) in zip(figure.subplots(1, 5), [*shown, ("its error", found - N, (-off, off))]):
        plot.function(Y, Y.batch(values), ax=ax, limits=limits, label="value").set(title=title, xticks=[], yticks=[])
    plot.save(path, figure)


def main(short=False):
    """Returns the mean error of solutions with the network."""
    comm, start = fd.COMM_WORLD, time.perf_counter()
    output = Path(__file__).parent / "output"
    data = Data(*((20, 2, 0) if short else (100, 20, 1)))
    mesh = read_mesh(PLATE, comm)
    finer = None if short else LabelSpace(fd.FunctionSpace(fd.MeshHierarchy(mesh, 1)[-1], "CG", 1))
    equation = Equation(LabelSpace(fd.FunctionSpace(mesh, "CG", 1)))
    g, u, _ = data.at(equation.Y, "train")
    terms = Terms(equation, g, u, *((20, 60, (1e-6,)) if short else (RANK, ITERATIONS, WEIGHTS)))
    errors = Errors(data, equation)
    errors.of_terms(terms)
    lines = list(errors.rows())
    if finer is not None:
        there = Errors(data, Equation(finer))
        there.of_network("network, on the mesh twice as fine", terms.net.on(finer), terms.head.on(finer))
        lines.insert(-2, list(there.rows())[-1])
    order = float(np.median([newton_order(norms) for norms in errors.norms if len(norms)]))
    rate = rate_through_the_solve(equation, terms, *(values[:, 0] for values in errors.tests["as in training"][:2]))
    steps = ", ".join(f"{norm:.0e}" for norm in errors.norms[0])
    lines += ["", f"Newton's method with the network, norms of the residual: {steps}; median order {order:.2f}"]
    lines += [f"Taylor rate of a misfit through the solve, in all that the network learns: {rate:.2f}"]
    if comm.rank == 0:
        output.mkdir(exist_ok=True)
        (output / "closure.txt").write_text("\n".join([*lines, "", NOTE]))
        print("\n".join(lines))
        print(f"Tikhonov's weight: {terms.weight:g}; time: {time.perf_counter() - start:.0f} s")
    draw(output / "closure.png", errors, terms.net, terms.head)
    mean = {name: [errors.mean(name, test)[0] for test in TESTS] for name in errors.of_u}
    # What this page claims: a third of the error of a linear map, and a tenth of that of c u, in all equations.
    assert order > 1.8 and rate > 1.98 and all(np.isfinite(errors.of_u["network"][test]).all() for test in TESTS)
    assert all(ours < (0.5 if short else 0.1) * others for ours, others in zip(mean["network"], mean["c u"]))
    assert short or all(ours < others / 3 for ours, others in zip(mean["network"], mean["linear map"]))
    return mean["network"][0]


if __name__ == "__main__":
    logging.getLogger("fem_resnet").setLevel(logging.ERROR)  # of iterations that end at their limit
    main(SHORT)
