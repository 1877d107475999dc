"""The doors of control, Hamilton-Jacobi-Bellman, the co-state, the theory of section 3 and verify; see `doors.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from unittest import mock

import firedrake as fd
import matplotlib.figure
import numpy as np
from doors import Door
from helpers import label_space, laplace, smooth
from problems import autonomous_network, learning_problem, network, polynomials

from fem_resnet import (
    AutonomousProblem,
    Batch,
    Box,
    ClosedLoop,
    Controls,
    ControlSet,
    Costate,
    DepthInterpolant,
    EigenExpansion,
    Ellipse,
    EnergyMonitor,
    Equilibria,
    FrozenSpectra,
    GrowthMonitor,
    Hamiltonian,
    Head,
    KernelSampling,
    LabelSpace,
    LearningProblem,
    LinearisedFlow,
    LocalClosedLoop,
    LocalFeedback,
    LowRankFeedback,
    LowRankKernel,
    NodalBox,
    NodalSets,
    Pair,
    Points,
    Polygon,
    Propagator,
    Residual,
    ResidualNetwork,
    RowBall,
    RowBox,
    RunningCost,
    Sections,
    SingularSystem,
    SpanBox,
    Spectrum,
    StabilityReport,
    StateGrid,
    SteadyStates,
    Trajectory,
    ValueFunction,
    WellPosedness,
    autonomous_problem,
    cell_indicators,
    circle_radius,
    class_space,
    closed_loop,
    compress,
    controls_with_cost,
    convex_energy_radius,
    costate_check,
    depth_limit,
    dissipation_ratio,
    duhamel,
    eigen_expansion,
    energy_conditions,
    energy_step_limit,
    extremal_controls,
    feedback_controls,
    feedback_speeds,
    find_equilibria,
    find_steady_states,
    fit_growth,
    follow_trajectory,
    from_blocks,
    from_network,
    frozen_spectra,
    get_activation,
    hamiltonian_along,
    hessian_spectrum,
    integrated_norms,
    least_squares,
    lipschitz_bound,
    middle_pairs,
    observed_decay,
    picard,
    pmp_residual,
    raise_controls,
    singular_system,
    solve_costate,
    solve_linearised,
    solve_trajectory,
    solve_value_function,
    stability_estimate,
    stability_report,
    stability_verdict,
    state_array,
    terminal_costate,
    tikhonov,
    to_network,
    weighted_identity,
    well_posedness_constants,
    width_limit,
    zero_set,
)  # fmt: skip
from fem_resnet.theory.limits.residual_network import EULER
from fem_resnet.verify import suite
from fem_resnet.verify.report import Report

# -- what arguments may be --------------------------------------------------------------------------------------------

FLAG = {"a bool"}
NUMBER = {"zero", "a negative number", "a fraction", "a huge integer"}
POSITIVE = {"a fraction", "a huge integer"}
NOT_NEGATIVE = POSITIVE | {"zero"}
#: Values that an array without axes may have.
ENTRY = NUMBER - {"a huge integer"} | {"a bool"}
OPTIONS = {"None", "an empty dict"}
PREFIX = {"None", "an empty string"}
#: A name of a file, or one that the operating system refuses.
FILE = {"a string", "an empty string", "a path"}
OF_SOLVER = {"solver_parameters": OPTIONS, "options_prefix": PREFIX}
ANOTHER_SOLVER = {"solver_parameters": {"ts_rk_type": "5dp"}, "options_prefix": "another_"}


def of(make: Callable, function: Callable, sound: Callable, takes=(), **more) -> Door:
    """The door of a method of the object that `make` makes."""
    return Door(function, lambda: {"self": make()} | sound(), dict(takes), **more)


# -- what they are called with ----------------------------------------------------------------------------------------


@cache
def problem() -> LearningProblem:
    """Four samples, three layers, a head."""
    return learning_problem(network("disk", "CG1"))


@cache
def one_sample() -> LearningProblem:
    """Without head and regulariser."""
    return learning_problem(net(), head=False, weight=None, samples=1)


@cache
def net() -> ResidualNetwork:
    return network("disk", "CG1", bias="basis", size=0.3)


def Y() -> LabelSpace:
    return phi().Y


def phi():
    return laplace("disk", "CG1", 4)


@cache
def euler() -> ResidualNetwork:
    """An autonomous network with one kernel on the span of four functions, in steps of Euler."""
    return autonomous_network(
        LowRankKernel(phi(), phi()), np.diag([1.0, 2.0, 0.5, 3.0]), solver_parameters=EULER, times=[0.0, 0.4, 1.0]
    )


@cache
def field(seed=0, samples=1) -> fd.Function:
    return Y().batch(smooth(Y(), samples, seed=seed))


@cache
def trajectory() -> Trajectory:
    return solve_trajectory(net(), field(), steps=2)


@cache
def costate() -> Costate:
    return solve_costate(trajectory(), field(3))


@cache
def run():
    J, run = one_sample().record()
    J.derivative()
    return run


@cache
def pair() -> Pair:
    return middle_pairs(run(), "maximise")[0]


def controls() -> Controls:
    return Controls.of_layer(net(), 0)


@cache
def hamiltonian() -> Hamiltonian:
    return Hamiltonian(Y(), net().activation, "maximise")


@cache
def charging() -> Hamiltonian:
    """With a cost of the controls."""
    return Hamiltonian(Y(), net().activation, "maximise", None, None, (0.5, 0.2))


def box() -> Box:
    return Box((-9, 9), (-9, 9))


def row_box() -> RowBox:
    return RowBox(polynomials(Y()), (-9.0, 9.0), (-9.0, 9.0))


def span_box() -> SpanBox:
    return SpanBox(phi(), polynomials(Y()), (-9.0, 9.0), (-9.0, 9.0))


@cache
def residual() -> Residual:
    return pmp_residual(one_sample(), box(), rounds=0)


@cache
def axes():
    return matplotlib.figure.Figure().subplots(1, 3).tolist()


@cache
def monitored(kind) -> tuple:
    """A monitor that has measured, and its last arguments."""
    monitor, calls = kind(net()), []
    follow_trajectory(net(), field(), lambda layer, step: (calls.append((layer, step)), monitor(layer, step)))
    return monitor, *calls[-1]


@cache
def system() -> SingularSystem:
    return singular_system(LowRankKernel(phi(), phi()), np.diag([1.0, 2.0, 0.5, 3.0]))


@cache
def autonomous() -> AutonomousProblem:
    return autonomous_problem(euler())


@cache
def steady() -> SteadyStates:
    return find_steady_states(euler())


@cache
def equilibria() -> Equilibria:
    return find_equilibria(euler())


@cache
def expansion() -> EigenExpansion:
    return eigen_expansion(euler(), field())


@cache
def spectra() -> FrozenSpectra:
    return frozen_spectra(net(), field())


@cache
def constants() -> WellPosedness:
    return well_posedness_constants(net())


@cache
def flow() -> LinearisedFlow:
    return LinearisedFlow(euler(), field())


@cache
def propagator() -> Propagator:
    return flow().propagator()


@cache
def report() -> StabilityReport:
    return stability_report(euler(), field())


@cache
def feedback() -> LocalFeedback:
    return LocalFeedback(strict(), gradient_tolerance=1e-9)


@cache
def strict() -> LearningProblem:
    """Inputs that are their own targets: controls 0 are a strict minimum."""
    still = ResidualNetwork(laplace("disk", "CG1", 1), bias=laplace("disk", "CG1", 1), layers=2)
    return LearningProblem(still, None, least_squares, tikhonov(10.0), Batch(field(), field()))


@cache
def many() -> LowRankFeedback:
    return LowRankFeedback(feedback())


@cache
def loop() -> LocalClosedLoop:
    return LocalClosedLoop(strict(), gradient_tolerance=1e-9)


@cache
def cell() -> LabelSpace:
    return class_space(1)


def own(values) -> np.ndarray:
    """The values of the one cell, on the rank that has it."""
    return np.array(values)[: cell().nodes]


@cache
def value_function() -> ValueFunction:
    return solve_value_function(
        cell(), Box((-1, 1), (0, 0)), "identity", own([2.0]), StateGrid(own([[0.0, 0.5]]), 0.25), final_time=1.0
    )


@cache
def controlled() -> ClosedLoop:
    return closed_loop(value_function(), own([[0.1, 0.2]]))


@cache
def three_points() -> LabelSpace:
    return class_space(3)


def of_coordinates(x: np.ndarray) -> np.ndarray:
    return np.cos(x[:, :1])


def another_of_coordinates(x: np.ndarray) -> np.ndarray:
    return np.sin(x[:, :1])


def gauss(y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.exp(-((y - z) ** 2).sum(axis=-1))


def another_kernel(y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.exp(-2 * ((y - z) ** 2).sum(axis=-1))


def takes_step(layer, step) -> None:
    pass


def takes_time(t: float) -> None:
    pass


def concave(a: np.ndarray) -> np.ndarray:
    return 2 - a**2


def verify(problem, *, quick, exit_first, time_limit):
    """`verify`, without the checks."""
    with mock.patch.object(suite, "_verified", lambda *given, **options: Report("nothing")):
        return suite.verify(problem, quick=quick, exit_first=exit_first, time_limit=time_limit)


# -- sets of controls: nothing here has a communicator -------------------------------------------------------------------

ENDS = {"bias": (-1.0, 2.0), "kernel": (-0.5, 0.5)}
CONTROL_SETS = {
    "Box": Door(Box, lambda: dict(ENDS), parted=("bias", "kernel")),
    "Ellipse": Door(
        Ellipse,
        lambda: {"centre": (0.0, 1.0), "axes": 2.0},
        {"axes": ENTRY - {"zero"}},
        parted=("centre", "axes"),
    ),
    "Points": Door(Points, lambda: {"points": [(0.0, -1.0), (0.0, 1.0)]}, parted=("points",)),
    "Polygon": Door(Polygon, lambda: {"corners": [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]}, parted=("corners",)),
    "Sections": Door(
        Sections,
        lambda: {"bias": (0.0, 1.0), "lower": np.zeros_like, "upper": concave, "convex": False, "grid": 5},
        {"convex": FLAG},
        parted=("bias", "lower", "upper", "convex", "grid"),
    ),
}
#: Sets that depend on y.
NODAL_SETS = {
    "NodalBox": Door(NodalBox, lambda: {"Y": Y()} | ENDS, parted=("Y", "bias", "kernel")),
    "NodalSets": Door(
        NodalSets,
        lambda: {"Y": Y(), "sets": [Ellipse(), Box((-1, 1), (0, 1))], "number": np.arange(Y().nodes) % 2},
        parted=("Y", "number"),
        another={"sets": [Ellipse(), Box((-1, 1), (0, 2))]},
    ),
}
A_SETS = {
    "ControlSet": (Ellipse, ControlSet), "Box": (box, Box),
    "Polygon": (lambda: Polygon([(0, 0), (1, 0), (0.2, 0.2), (0, 1)]), Polygon),
    "Points": (lambda: Points([(0.0, -1.0), (0.0, 1.0)]), Points), "Ellipse": (Ellipse, Ellipse),
    "Sections": (lambda: Sections((0, 1), np.zeros_like, np.ones_like), Sections),
}  # fmt: skip
ANY = ENTRY | {"an array of another shape", "an empty list"}
PLACES = {
    "sections": (lambda: {"a": 0.5}, {"a": ANY}),
    "maximise": (lambda: {"alpha": 1.0, "beta": 0.5}, {"alpha": ANY, "beta": ANY}),
    "largest": (
        lambda: {"positive": 1.0, "negative": 0.5},
        dict.fromkeys(("positive", "negative"), ANY - {"a negative number"}),
    ),
    "smallest": (
        lambda: {"positive": 1.0, "negative": 0.5},
        dict.fromkeys(("positive", "negative"), ANY - {"a negative number"}),
    ),
    "contains": (lambda: {"a": 0.5, "b": 0.0, "tolerance": 1e-9}, {"a": ANY, "b": ANY, "tolerance": NOT_NEGATIVE}),
    "support": (lambda: {"alpha": 1.0, "beta": 0.5}, {"alpha": ANY, "beta": ANY}),
    "sample": (lambda: {"count": 3}, {}),
}
for name, (make, kind) in A_SETS.items():
    for called, (sound, takes) in PLACES.items():
        if called in vars(kind) and not getattr(vars(kind)[called], "__isabstractmethod__", False):
            CONTROL_SETS[f"{name}.{called}"] = of(make, getattr(kind, called), sound, takes, parted=tuple(sound()))
#: Their arrays have the nodes as first axis: one of length 0 is refused, by the names of both arrays that broadcast.
ON_NODES = {
    "NodalBox": (lambda: NodalBox(Y(), (-1, 1), (0, 1)), NodalBox),
    "NodalSets": (lambda: NodalSets(Y(), [Ellipse(), box()], np.arange(Y().nodes) % 2), NodalSets),
}
for name, (make, kind) in ON_NODES.items():
    for called in ("sections", "maximise", "largest", "smallest", "contains"):
        sound, takes = PLACES[called]
        pair_of = ", ".join(argument for argument in sound() if argument != "tolerance")
        NODAL_SETS[f"{name}.{called}"] = of(
            make, getattr(kind, called), sound,
            {argument: set(kinds) - {"an empty list"} for argument, kinds in takes.items()},
            called={argument: f"{argument}|{pair_of}" for argument in pair_of.split(", ")},
            parted=tuple(sound()),
        )  # fmt: skip

# -- control ----------------------------------------------------------------------------------------------------------

HAMILTONIANS = {
    "Pair": Door(
        Pair,
        lambda: {"f": np.ones((3, 2)), "r": np.ones((3, 2)), "convention": "minimise"},
        parted=("f", "r", "convention"),
    ),
    "Pair.to": of(pair, Pair.to, lambda: {"convention": "minimise"}, parted=("convention",)),
    "Controls": Door(
        Controls, lambda: {"a": np.ones(3), "phi": np.ones((3, 2)), "psi": np.ones((3, 2))}, parted=("a", "phi", "psi")
    ),
    "Controls.argument": of(controls, Controls.argument, lambda: {"Y": Y(), "f": pair().f}, parted=("Y", "f")),
    "Controls.transpose": of(controls, Controls.transpose, lambda: {"Y": Y(), "v": pair().f}, parted=("Y", "v")),
    "Controls.towards": of(
        controls,
        Controls.towards,
        lambda: {"other": controls(), "share": 0.5},
        {"share": ENTRY},
        parted=("other", "share"),
    ),
    "Controls.in_bases": of(controls, Controls.in_bases, lambda: {"Y": Y()}, parted=("Y",)),
    "Controls.of_layer": Door(
        Controls.of_layer,
        lambda: {"net": net(), "layer": 0, "fraction": 0.5},
        {"layer": {"zero"}, "fraction": {"zero"}},
        parted=("net",),
    ),
    "Hamiltonian": Door(
        Hamiltonian,
        lambda: {
            "Y": Y(),
            "activation": get_activation("tanh"),
            "convention": "minimise",
            "running": RunningCost(0.5),
            "weights": [1.0, 2.0],
            "tikhonov": [0.5, 0.2],
        },
        {"running": {"None"}, "weights": {"None"}},
        parted=("Y",),
        another={"activation": get_activation("relu"), "convention": "maximise", "running": 3},
    ),
    "Hamiltonian.of": Door(
        Hamiltonian.of,
        lambda: {"problem": one_sample(), "convention": "minimise"},
        parted=("problem",),
        another={"convention": "maximise"},
    ),
    **{
        f"Hamiltonian.{name}": of(
            hamiltonian,
            getattr(Hamiltonian, name),
            lambda: {"pair": pair(), "controls": controls()},
            parted=("pair", "controls"),
        )
        for name in (
            "density",
            "__call__",
            "cost",
            "cost_in_a",
            "cost_in_f",
            "in_r",
            "in_f",
            "in_a",
            "in_b",
            "slope_times_costate",
        )
    },
    "middle_pairs": Door(
        middle_pairs, lambda: {"run": run(), "convention": "minimise"}, parted=("run",), another={"convention": "maximise"}
    ),
    "hamiltonian_along": Door(hamiltonian_along, lambda: {"run": run(), "H": hamiltonian()}, parted=("run", "H")),
    "extremal_controls": Door(
        extremal_controls,
        lambda: {"Y": Y(), "A": box(), "pair": pair(), "tie": 1e-9},
        {"tie": NOT_NEGATIVE},
        parted=("Y",),
        another={"A": Box((-9, 9), (-9, 8)), "pair": Pair(np.ones((1, 1)), np.ones((1, 1)), "minimise")},
    ),
    "controls_with_cost": Door(
        controls_with_cost,
        lambda: {"H": charging(), "A": box(), "pair": pair(), "controls": controls(), "functions": 5},
        parted=("H", "controls"),
        another={"A": Ellipse(), "pair": Pair(np.ones((1, 1)), np.ones((1, 1)), "minimise")},
    ),
    "pmp_residual": Door(
        pmp_residual,
        lambda: {"problem": one_sample(), "A": box(), "tolerance": 1e-12, "rounds": 0},
        {"tolerance": NOT_NEGATIVE, "rounds": {"zero"}},
        parted=("problem",),
        another={"A": Points([(0, 1), (1, 0)])},
    ),
    "Residual.plot": of(residual, Residual.plot, lambda: {"axes": axes()}, {"axes": {"an empty list"}}, another={"axes": []}),
    "RowBox": Door(RowBox, lambda: {"psi": phi()} | ENDS, parted=("psi",)),
    "RowBox.project": of(row_box, RowBox.project, lambda: {"rows": np.ones((Y().nodes, 4))}, parted=("rows",)),
    "RowBall": Door(RowBall, lambda: {"psi": phi(), "radius": 2.0}, {"radius": POSITIVE}, parted=("psi",)),
    "RowBall.project": of(
        lambda: RowBall(polynomials(Y()), 2.0), RowBall.project, lambda: {"rows": np.ones((Y().nodes, 4))}, parted=("rows",)
    ),
    "SpanBox": Door(SpanBox, lambda: {"phi": phi(), "psi": polynomials(Y())} | ENDS, parted=("phi", "psi")),
    "SpanBox.project": of(
        span_box, SpanBox.project, lambda: {"a": np.ones(Y().nodes), "beta": np.ones((4, 3))}, parted=("a", "beta")
    ),
    **{
        name: Door(
            raise_controls,
            lambda A=A: {"H": hamiltonian(), "A": A(), "pair": pair(), "controls": controls(), "iterations": 1},
            {"iterations": {"zero"}},
            parted=("H", "controls"),
            another={
                "A": Box((0, 1), (0, 1)),
                "pair": Pair(np.ones((1, 1)), np.ones((1, 1)), "minimise"),
            },
        )
        for name, A in (("raise_controls", row_box), ("raise_controls.span", span_box))
    },
    "ValueFunction.__call__": of(
        value_function, ValueFunction.__call__, lambda: {"v": own([[0.1, 0.2]]), "t": 0.5}, {"t": {"zero"}}, parted=("v",)
    ),
    "ValueFunction.gradient": of(
        value_function, ValueFunction.gradient, lambda: {"v": own([[0.1, 0.2]]), "t": 0.5}, {"t": {"zero"}}, parted=("v",)
    ),
    "ValueFunction.states": of(
        value_function,
        ValueFunction.states,
        lambda: {"v": own([[0.1, 0.2]]), "t": 0.5, "spare": 1},
        {"t": {"zero"}, "spare": {"zero"}},
        parted=("v",),
    ),
    "ValueFunction.axes": of(
        value_function, ValueFunction.axes, lambda: {"level": 0}, {"level": {"zero", "a negative number"}}, parted=("level",)
    ),
    "ValueFunction.level": of(value_function, ValueFunction.level, lambda: {"t": 0.5}, {"t": {"zero"}}, parted=("t",)),
    **{
        f"ValueFunction.{name}": of(
            value_function,
            getattr(ValueFunction, name),
            lambda: {"states": np.array([[0.1, 0.2]]), "t": 0.5},
            {"t": {"zero"}},
            parted=("states", "t"),
        )
        for name in ("at", "slopes")
    },
    "solve_value_function": Door(
        solve_value_function,
        lambda: {
            "Y": cell(),
            "A": Box((-1, 1), (0, 0)),
            "activation": "identity",
            "target": own([2.0]),
            "grid": StateGrid(own([[0.0, 0.5]]), 0.25, samples=2, memory=1e8),
            "final_time": 1.0,
            "head": Head(cell_indicators(cell()), cell_indicators(cell()), "identity"),
            "loss": least_squares,
            "running": RunningCost(0.5),
            "monitor": takes_time,
            "resume": None,
        },
        {
            "final_time": {"a fraction"},
            "head": {"None"},
            "loss": {"None"},
            "monitor": {"None", "a function"},
            "running": {"None"},
            "resume": {"None"},
        },
        parted=("Y", "target"),
        another={
            "A": Box((-1, 2), (0, 0)),
            "activation": "tanh",
            "grid": StateGrid(own([[0.0, 0.5]]), 0.5),
            "head": None,
            "loss": None,
            "running": np.abs,
            "monitor": 3,
            "resume": 3,
        },
        called={"final_time": "final_time|spacing"},
    ),
    "StateGrid": Door(
        StateGrid,
        lambda: {"start": own([[0.0, 0.5]]), "spacing": 0.25, "samples": 2, "memory": 1e8},
        {"start": {"an empty list"}, "spacing": POSITIVE, "memory": POSITIVE},
        parted=("start", "spacing", "samples", "memory"),
    ),
    "feedback_speeds": Door(
        feedback_speeds, lambda: {"F": value_function(), "v": own([[0.1, 0.2]]), "t": 0.5}, {"t": {"zero"}}, parted=("F", "v")
    ),
    "feedback_controls": Door(
        feedback_controls, lambda: {"F": value_function(), "v": own([[0.1]]), "t": 0.5}, {"t": {"zero"}}, parted=("F", "v")
    ),
    "closed_loop": Door(
        closed_loop,
        lambda: {"F": value_function(), "v": own([[0.1, 0.2]]), "t": 0.5, "steps": 3},
        {"t": {"zero"}, "steps": {"None"}},
        parted=("F", "v"),
    ),
    "ClosedLoop.controls": of(
        controlled, ClosedLoop.controls, lambda: {"step": 0, "sample": 0}, {"step": {"zero"}, "sample": {"zero"}}
    ),
    "LocalFeedback": Door(
        LocalFeedback,
        lambda: {
            "problem": strict(),
            "gradient_tolerance": 1e9,
            "solver_parameters": {"ksp_rtol": 1e-9},
            "options_prefix": "mine_",
        },
        {"gradient_tolerance": NOT_NEGATIVE} | OF_SOLVER,
        parted=("problem",),
        another={"solver_parameters": {"ksp_rtol": 1e-8}, "options_prefix": "another_"},
    ),
    **{
        f"LocalFeedback.{name}": of(feedback, getattr(LocalFeedback, name), lambda: {"inputs": field(1)}, parted=("inputs",))
        for name in ("__call__", "predicted_value")
    },
    **{
        f"LocalFeedback.{name}": of(feedback, getattr(LocalFeedback, name), lambda: {"w": field(1)}, parted=("w",))
        for name in ("change_of_controls", "hessian")
    },
    "LocalFeedback.check": of(
        feedback,
        LocalFeedback.check,
        lambda: {"function": field(1), "name": "inputs"},
        {"name": {"a string"}},
        parted=("function", "name"),
        called={"function": "inputs"},
    ),
    "LocalFeedback.action": of(
        feedback,
        LocalFeedback.action,
        lambda: {"change": feedback().controls, "w": field(1)},
        {"change": {"None"}, "w": {"None"}},
        parted=("change", "w"),
    ),
    "LowRankFeedback": Door(LowRankFeedback, lambda: {"feedback": feedback()}, parted=("feedback",)),
    "LowRankFeedback.__call__": of(many, LowRankFeedback.__call__, lambda: {"inputs": field(1)}, parted=("inputs",)),
    "LowRankFeedback.predicted_values": of(
        many, LowRankFeedback.predicted_values, lambda: {"inputs": field(1)}, parted=("inputs",)
    ),
    "LowRankFeedback.hessian": of(many, LowRankFeedback.hessian, lambda: {"w": field(1)}, parted=("w",)),
    "LocalClosedLoop": Door(LocalClosedLoop, lambda: {"problem": strict()}, parted=("problem",)),
    "LocalClosedLoop.step": of(
        loop, LocalClosedLoop.step, lambda: {"layer": 0, "state": field(1)}, {"layer": {"zero"}}, parted=("state",)
    ),
    "LocalClosedLoop.__call__": of(loop, LocalClosedLoop.__call__, lambda: {"inputs": field(1)}, parted=("inputs",)),
    "hessian_spectrum": Door(
        hessian_spectrum,
        lambda: {
            "problem": problem(),
            "count": 1,
            "gauss_newton": True,
            "solver_parameters": {"eps_tol": 1e-6},
            "options_prefix": "mine_",
        },
        {"gauss_newton": FLAG} | OF_SOLVER,
        parted=("problem",),
        another={"solver_parameters": {"eps_tol": 1e-5}, "options_prefix": "another_"},
    ),
    "Spectrum.variance": of(
        lambda: Spectrum(np.array([2.0, 1.0]), [], np.zeros(2)),
        Spectrum.variance,
        lambda: {"weight": 0.1},
        {"weight": POSITIVE},
        parted=("weight",),
    ),
}

# -- states and co-states ---------------------------------------------------------------------------------------------

COSTATES = {
    "solve_trajectory": Door(
        solve_trajectory,
        lambda: {
            "net": net(),
            "initial": field(),
            "steps": 2,
            "keep_stages": False,
            "solver_parameters": {"ts_rk_type": "4"},
            "options_prefix": "mine_",
        },
        {"steps": {"None"}, "keep_stages": FLAG} | OF_SOLVER,
        parted=("net", "initial"),
        another=ANOTHER_SOLVER,
    ),
    "follow_trajectory": Door(
        follow_trajectory,
        lambda: {
            "net": net(),
            "initial": field(),
            "monitor": takes_step,
            "steps": 2,
            "solver_parameters": {"ts_rk_type": "4"},
            "options_prefix": "mine_",
        },
        {"monitor": {"a function"}, "steps": {"None"}} | OF_SOLVER,
        parted=("net", "initial"),
        another={"monitor": 3} | ANOTHER_SOLVER,
    ),
    "Trajectory.__call__": of(trajectory, Trajectory.__call__, lambda: {"t": 0.5}, {"t": {"zero"}}),
    "Trajectory.layer_at": of(trajectory, Trajectory.layer_at, lambda: {"t": 0.5}, {"t": {"zero"}}, parted=("t",)),
    "solve_costate": Door(
        solve_costate,
        lambda: {
            "trajectory": trajectory(),
            "terminal": field(3),
            "running": RunningCost(0.5),
            "weights": [2.0],
            "partner": False,
            "solver_parameters": {"ts_rk_type": "4"},
            "options_prefix": "mine_",
        },
        {"running": {"None"}, "weights": {"None"}} | OF_SOLVER,
        parted=("trajectory", "terminal"),
        another={"running": np.multiply, "weights": [3.0]} | ANOTHER_SOLVER,
    ),
    "Costate.at_layer": of(costate, Costate.at_layer, lambda: {"layer": 0}, {"layer": {"zero"}}),
    **{
        f"Costate.{name}": of(costate, getattr(Costate, name), lambda: {"t": 0.5}, {"t": {"zero"}})
        for name in ("__call__", "bias_gradient", "kernel_gradient")
    },
    "Costate.gradient": of(
        costate,
        Costate.gradient,
        lambda: {"regulariser": tikhonov(0.1)},
        {"regulariser": {"None"}},
        another={"regulariser": 3},
    ),
    "terminal_costate": Door(
        terminal_costate, lambda: {"problem": one_sample(), "final": field()}, parted=("problem", "final")
    ),
    "costate_check": Door(
        costate_check,
        lambda: {
            "problem": one_sample(),
            "refinements": (1,),
            "steps": 4,
            "solver_parameters": {"ts_rk_type": "4"},
            "options_prefix": "mine_",
        },
        {"steps": {"None"}} | OF_SOLVER,
        parted=("problem",),
        another={"refinements": (2,)} | ANOTHER_SOLVER,
    ),
}

# -- section 3 --------------------------------------------------------------------------------------------------------

AT_NODES = lambda name: lambda: {name: pair().f}  # noqa: E731
THEORY = {
    **{
        tool.__name__: Door(tool, lambda: {"net": net()}, parted=("net",))
        for tool in (energy_conditions, well_posedness_constants, lipschitz_bound)
    },
    **{tool.__name__: Door(tool, lambda: {"net": euler()}, parted=("net",)) for tool in (energy_step_limit, to_network)},
    **{
        tool.__name__: Door(tool, lambda: {"net": euler(), "at": 0.5}, {"at": {"None", "zero"}}, parted=("net",))
        for tool in (autonomous_problem, stability_verdict)
    },
    **{
        tool.__name__: Door(
            tool,
            lambda: {"net": euler(), "at": 0.5, "tolerance": 1e-8},
            {"at": {"None", "zero"}, "tolerance": NOT_NEGATIVE},
            parted=("net",),
        )
        for tool in (find_steady_states, find_equilibria)
    },
    **{
        tool.__name__: Door(tool, lambda: {"net": euler(), "initial": field()}, parted=("net", "initial"))
        for tool in (observed_decay, frozen_spectra, LinearisedFlow)
    },
    "eigen_expansion": Door(
        eigen_expansion,
        lambda: {"net": euler(), "perturbation": field(), "at": 0.5},
        {"at": {"None", "zero"}},
        parted=("net", "perturbation"),
    ),
    "EigenExpansion.__call__": of(expansion, EigenExpansion.__call__, lambda: {"t": 0.5}, {"t": NOT_NEGATIVE}),
    "integrated_norms": Door(integrated_norms, lambda: {"net": net()}, parted=("net",)),
    "stability_estimate": Door(
        stability_estimate, lambda: {"net": net(), "first": field(), "second": field(1)}, parted=("net", "first", "second")
    ),
    "WellPosedness.solution_bound": of(
        constants,
        WellPosedness.solution_bound,
        lambda: {"initial": 1.0},
        {"initial": ENTRY - {"a negative number"} | {"an empty list"}},
        parted=("initial",),
    ),
    "picard": Door(
        picard,
        lambda: {"net": euler(), "initial": field(), "split": True, "tolerance": 1e-9, "max_iterations": 3},
        {"split": FLAG, "tolerance": NOT_NEGATIVE},
        parted=("net", "initial"),
    ),
    "singular_system": Door(
        singular_system,
        lambda: {"kernel": LowRankKernel(phi(), phi()), "beta": np.diag([1.0, 2.0, 3.0, 4.0]), "tolerance": 0.1},
        {"tolerance": NOT_NEGATIVE},
        parted=("kernel",),
    ),
    **{
        f"SingularSystem.{name}": of(system, getattr(SingularSystem, name), AT_NODES(argument), parted=(argument,))
        for name, argument in (
            ("left_coefficients", "u"),
            ("right_coefficients", "f"),
            ("null_part", "f"),
            ("apply", "f"),
            ("least_norm", "a"),
        )
    },
    **{
        f"SingularSystem.{name}": of(system, getattr(SingularSystem, name), lambda: {"c": np.ones((4, 1))}, parted=("c",))
        for name in ("left_values", "right_values")
    },
    "SingularSystem.weighted": of(system, SingularSystem.weighted, lambda: {"c": pair().f[:, 0]}, parted=("c",)),
    "AutonomousProblem.rate": of(autonomous, AutonomousProblem.rate, AT_NODES("u"), parted=("u",)),
    "AutonomousProblem.argument": of(autonomous, AutonomousProblem.argument, AT_NODES("f"), parted=("f",)),
    "AutonomousProblem.norms": of(autonomous, AutonomousProblem.norms, AT_NODES("values"), parted=("values",)),
    "AutonomousProblem.read": of(
        autonomous, lambda self, function: self.read(function, "function"), lambda: {"function": field()}, parted=("function",)
    ),
    "zero_set": Door(zero_set, lambda: {"activation": get_activation("tanh")}, parted=("activation",)),
    **{
        f"SteadyStates.{name}": of(steady, getattr(SteadyStates, name), lambda: {"f": field()}, parted=("f",))
        for name in ("residuals", "contain", "nearest", "distance")
    },
    **{
        f"Equilibria.{name}": of(equilibria, getattr(Equilibria, name), lambda: {"u": field()}, parted=("u",))
        for name in ("residuals", "contain", "nearest", "distance", "describe")
    },
    **{
        f"Equilibria.{name}": of(equilibria, getattr(Equilibria, name), lambda: {"f": field()}, parted=("f",))
        for name in ("velocity", "found_from")
    },
    "FrozenSpectra.plot": of(
        spectra, FrozenSpectra.plot, lambda: {"axes": axes()[0], "sample": 0}, {"sample": {"zero"}}, parted=("axes", "sample")
    ),
    **{kind.__name__: Door(kind, lambda: {"net": net()}, parted=("net",)) for kind in (EnergyMonitor, GrowthMonitor)},
    **{
        f"{kind.__name__}.__call__": of(
            lambda kind=kind: kind(net()),
            kind.__call__,
            lambda kind=kind: dict(zip(("layer", "step"), monitored(kind)[1:])),
            parted=("layer", "step"),
        )
        for kind in (EnergyMonitor, GrowthMonitor)
    },
    **{
        f"{kind.__name__}.watch": of(
            lambda kind=kind: kind(net()), kind.watch, lambda: {"run": net().run(field())}, parted=("run",)
        )
        for kind in (EnergyMonitor, GrowthMonitor)
    },
    "EnergyMonitor.values": of(
        lambda: monitored(EnergyMonitor)[0], EnergyMonitor.values, lambda: {"name": "primitive"}, another={"name": "power"}
    ),
    "GrowthMonitor.norms": of(
        lambda: monitored(GrowthMonitor)[0], GrowthMonitor.norms, lambda: {"name": "L1"}, another={"name": "L2"}
    ),
    "fit_growth": Door(
        fit_growth, lambda: {"times": np.arange(8.0), "norms": np.exp(np.arange(8.0))[:, None]}, parted=("times", "norms")
    ),
    "circle_radius": Door(circle_radius, lambda: {"A": [[0.0]], "b": [1.0]}, parted=("A", "b")),
    "convex_energy_radius": Door(convex_energy_radius, lambda: {"A": [[0.0]], "b": [1.0]}, parted=("A", "b")),
    "dissipation_ratio": Door(dissipation_ratio, lambda: {"system": system()}, parted=("system",)),
    "depth_limit": Door(
        depth_limit,
        lambda: {
            "net": euler(),
            "initial": field(),
            "halvings": 0,
            "between": 1,
            "solver_parameters": {"ts_rk_type": "4"},
        },
        {"halvings": {"zero"}, "between": {"zero", "None"}, "solver_parameters": OPTIONS},
        parted=("net", "initial"),
        another={"solver_parameters": {"ts_rk_type": "5dp"}},
    ),
    "DepthInterpolant": Door(DepthInterpolant, lambda: {"net": euler(), "initial": field()}, parted=("net", "initial")),
    "DepthInterpolant.__call__": of(
        lambda: DepthInterpolant(euler(), field()), DepthInterpolant.__call__, lambda: {"t": 0.5}, {"t": {"zero"}}
    ),
    "DepthInterpolant.at_fraction": of(
        lambda: DepthInterpolant(euler(), field()), DepthInterpolant.at_fraction, lambda: {"theta": 0.5}, {"theta": {"zero"}}
    ),
    "width_limit": Door(
        width_limit,
        lambda: {
            "net": net().replace(kernel=replace(net().settings.kernel, psi=phi()), bias=phi()),
            "initial": of_coordinates,
            "spaces": [label_space("disk", "CG1"), label_space("disk", "CG1", 2)],
            "terminal": of_coordinates,
        },
        {"terminal": {"None"}},
        parted=("net",),
        another={"initial": another_of_coordinates, "terminal": another_of_coordinates, "spaces": [3]},
    ),
    "from_blocks": Door(
        from_blocks,
        lambda: {
            "blocks": [(np.ones(2), np.ones((2, 3)), np.ones((3, 2)), np.ones(3))],
            "z_0": np.array([1.0, 2.0, 3.0]),
            "readout": (np.ones((2, 3)), np.ones(2)),
            "tau": 0.5,
            "activation": "relu",
            "prediction": "softmax",
            "comm": fd.COMM_WORLD,
        },
        {"readout": {"None"}, "tau": {"a fraction", "a huge integer"}},
        parted=("comm",),
        another={
            "blocks": [(np.zeros(2), np.ones((2, 3)), np.ones((3, 2)), np.ones(3))],
            "activation": "leaky_relu",
            "readout": (np.zeros((2, 3)), np.ones(2)),
        },
    ),
    "from_network": Door(
        from_network,
        lambda: {
            "a": np.array([1.0, 2.0, 3.0]),
            "B": np.diag([1.0, 2.0, 3.0]),
            "z_0": np.array([1.0, 2.0, 3.0]),
            "partition": three_points(),
            "tau": 0.5,
            "steps": 1,
        },
        {"tau": {"a fraction", "a bool"}},
        parted=("partition",),
    ),
    "state_array": Door(state_array, lambda: {"Y": Y(), "function": field()}, parted=("Y", "function")),
    "KernelSampling": Door(
        KernelSampling,
        lambda: {"affordable": 100, "confidence": 0.9, "seed": 1},
        {"affordable": {"zero"}, "seed": {"zero"}},
        parted=("affordable", "confidence", "seed"),
    ),
    "compress": Door(
        compress,
        lambda: {
            "kernel": gauss,
            "tolerance": 0.1,
            "Y": three_points(),
            "Z": three_points(),
            "beta": None,
            "largest_rank": 4,
            "sampling": KernelSampling(affordable=100, confidence=0.9, seed=1),
            "solver_parameters": {"svd_max_it": 50},
            "options_prefix": "mine_",
        },
        {"Z": {"None"}, "beta": {"None"}, "sampling": {"None"}} | OF_SOLVER,
        parted=("Y", "Z"),
        another={
            "kernel": another_kernel,
            "beta": 3.0,
            "sampling": KernelSampling(seed=2),
            "solver_parameters": {"svd_max_it": 60},
            "options_prefix": "another_",
        },
    ),
    "LinearisedFlow.tangent": of(
        flow,
        LinearisedFlow.tangent,
        lambda: {"direction": field(), "start": 0, "end": 1},
        {"start": {"zero"}, "end": {"None", "zero"}},
        parted=("direction",),
    ),
    "LinearisedFlow.adjoint": of(
        flow,
        LinearisedFlow.adjoint,
        lambda: {"costate": field(), "start": 0, "end": 1},
        {"start": {"zero"}, "end": {"None", "zero"}},
        parted=("costate",),
    ),
    "LinearisedFlow.propagator": of(
        flow,
        LinearisedFlow.propagator,
        lambda: {"start": 0, "end": 1, "sample": 0},
        {"start": {"zero"}, "end": {"None", "zero"}, "sample": {"zero"}},
    ),
    **{
        f"LinearisedFlow.{name}": of(
            flow,
            getattr(LinearisedFlow, name),
            lambda: {"start": 0, "end": 1, "operator_norm": False},
            {"start": {"zero"}, "end": {"None", "zero"}, "operator_norm": FLAG},
        )
        for name in ("bound", "exponent")
    },
    "LinearisedFlow.by_bias": of(
        flow, LinearisedFlow.by_bias, lambda: {"layer": 0, "r": pair().f}, {"layer": {"zero"}}, parted=("r",)
    ),
    "LinearisedFlow.slope": of(flow, LinearisedFlow.slope, lambda: {"layer": 0}, {"layer": {"zero"}}),
    "LinearisedFlow.frozen_eigenvalues": of(
        flow, LinearisedFlow.frozen_eigenvalues, lambda: {"layer": 0, "sample": 0}, {"layer": {"zero"}, "sample": {"zero"}}
    ),
    "Propagator": Door(
        Propagator,
        lambda: {"basis": flow().basis, "added": 0.1 * flow().basis.values, "times": (0.0, 1.0)},
        parted=("basis", "added"),
        another={"times": (0.0, 2.0)},
    ),
    "Propagator.apply": of(propagator, Propagator.apply, lambda: {"direction": field()}, parted=("direction",)),
    "Propagator.transpose": of(propagator, Propagator.transpose, lambda: {"costate": field()}, parted=("costate",)),
    "Propagator.__matmul__": of(
        lambda: flow().propagator(1, 2),
        Propagator.__matmul__,
        lambda: {"earlier": flow().propagator(0, 1)},
        parted=("earlier",),
    ),
    "Propagator.singular_function": of(
        propagator, Propagator.singular_function, lambda: {"k": 0}, {"k": {"zero", "a negative number"}}
    ),
    "solve_linearised": Door(
        solve_linearised,
        lambda: {
            "trajectory": trajectory(),
            "direction": field(1),
            "start": 0.1,
            "end": 0.5,
            "solver_parameters": {"ts_rk_type": "4"},
            "options_prefix": "mine_",
        },
        {"start": {"zero"}, "end": {"None"}} | OF_SOLVER,
        parted=("trajectory", "direction"),
        another=ANOTHER_SOLVER,
    ),
    "duhamel": Door(
        duhamel,
        lambda: {
            "trajectory": trajectory(),
            "directions": [*net().bias.functions, *net().kernel.functions],
            "solver_parameters": {"ts_rk_type": "4"},
            "options_prefix": "mine_",
        },
        OF_SOLVER,
        parted=("trajectory", "directions"),
        another=ANOTHER_SOLVER,
    ),
    "weighted_identity": Door(
        weighted_identity,
        lambda: {
            "trajectory": trajectory(),
            "direction": field(1),
            "solver_parameters": {"ts_rk_type": "4"},
            "options_prefix": "mine_",
        },
        OF_SOLVER,
        parted=("trajectory", "direction"),
        another=ANOTHER_SOLVER,
    ),
    "stability_report": Door(
        stability_report,
        lambda: {"net": euler(), "initial": field(), "terminal": field(3), "json": "report.json", "png": None},
        {"terminal": {"None"}, "json": FILE | {"None"}, "png": FILE | {"None"}},
        parted=("net", "initial", "terminal"),
        another={"json": "another.json", "png": "another.png"},
    ),
    "StabilityReport.draw": of(report, StabilityReport.draw, lambda: {"path": "report.png"}, {"path": FILE}, parted=("path",)),
    "verify": Door(
        verify,
        lambda: {"problem": problem(), "quick": True, "exit_first": True, "time_limit": 100.0},
        {"problem": {"None", "a function"}, "quick": FLAG, "exit_first": FLAG, "time_limit": {"None", "a fraction"}},
        parted=("problem",),
    ),
}

DOORS: dict[str, Door] = CONTROL_SETS | NODAL_SETS | HAMILTONIANS | COSTATES | THEORY

#: Public names that are not called with arguments from outside: what they are.
NO_DOORS: dict[str, str] = {
    "Compression": "what compress returns",
    "Convergence": "what depth_limit and width_limit return",
    "CostateCheck": "what costate_check returns",
    "Decay": "what observed_decay returns",
    "EnergyCondition": "what energy_conditions returns",
    "EnergyStatement": "what EnergyMonitor.statements returns",
    "EnergyStepLimit": "what energy_step_limit returns",
    "Equilibrium": "what Equilibria.describe returns",
    "Extremal": "what extremal_controls returns",
    "CostlyControls": "what controls_with_cost returns",
    "GrowthBound": "what GrowthMonitor.bounds returns",
    "GrowthFit": "what fit_growth returns",
    "KernelError": "a part of a Compression",
    "LayerStability": "a part of a StabilityReport",
    "LipschitzBound": "what lipschitz_bound returns",
    "NetworkArrays": "what to_network returns of Euler's method",
    "Picard": "what picard returns",
    "PicardPiece": "a part of a Picard",
    "Stability": "what stability_verdict returns",
    "StabilityEstimate": "what stability_estimate returns",
    "StageArrays": "what to_network returns of a method with several stages",
    "Suggestion": "a part of a StabilityReport",
    "WeightedIdentity": "what weighted_identity returns",
}
