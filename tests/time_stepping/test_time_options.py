"""Every type of TS with every option of time and adaptation: right against SciPy, or refused by name."""

import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from firedrake.adjoint import ReducedFunctional
from helpers import half_square_distance, laplace, network, smooth, smooth_direction, without_mpi
from petsc4py import PETSc
from scipy.integrate import solve_ivp

from fem_resnet import Bias, Layers, ResidualNetwork, StepFailure, solve_trajectory
from fem_resnet.time_stepping.methods import METHODS
from fem_resnet.time_stepping.options import OPTIONS, refuse_time_options

on_ranks = pytest.mark.parallel([1, 2, 3])

# -- problems, all of them dissipative: errors of steps add up and do not grow -----------------------------------------

#: Activation, layer times, size of the kernel: each to be stepped from a first step of a whole layer.
PROBLEMS = {
    "smooth": ("tanh", (0.0, 0.4, 2.0), 1.0),
    "decay": ("identity", (0.0, 3.0), 1.0),
    "stiff": ("identity", (0.0, 1.0), 1000.0),
    "saturated": ("tanh", (0.0, 0.4, 2.0), 40.0),
}
SAMPLES = 2


def own_network(problem="smooth", steps=1, options_prefix=None, **parameters):
    """Kernels are symmetric and positive; the bias is linear in t. phi does not span all: f has a part that no layer sees."""
    activation, times, size = PROBLEMS[problem]
    net = ResidualNetwork(
        laplace("interval", "DG0", 3),
        bias=Bias(in_time="linear"),
        layers=Layers(times, steps=steps),
        activation=activation,
        solver_parameters=parameters,
        options_prefix=options_prefix,
    )
    for layer in range(net.layers):
        net.kernel.set(layer, size * np.diag([1.0, 0.5, 2.0]) * (1 + layer))
    for k in range(net.layers + 1):
        net.bias.set(k, smooth(net.Y, 1, seed=k)[:, 0])
    return net


@cache
def reference(problem):
    """f(T) by SciPy, of the whole f."""
    net = own_network(problem)
    phi, f = net.kernel.space_basis.kernel.phi, smooth(net.Y, SAMPLES)
    for layer, (start, end) in enumerate(zip(net.times[:-1], net.times[1:])):
        B = phi.values @ net.kernel.get(layer) @ phi.weighted.T
        a = [net.bias.get(layer), net.bias.get(layer + 1)]

        def rate(t, y, a=a, B=B, start=start, end=end):
            s = (t - start) / (end - start)
            return net.activation(((1 - s) * a[0] + s * a[1])[:, None] - B @ y.reshape(f.shape)).ravel()

        f = solve_ivp(rate, (start, end), f.ravel(), method="LSODA", rtol=1e-12, atol=1e-13).y[:, -1].reshape(f.shape)
    return f


def run(net):
    """f(T), and the number of steps."""
    made = net.run(net.Y.batch(smooth(net.Y, SAMPLES)))
    return net.Y.values(made.final), sum(len(trace.steps) for piece in made._pieces for trace in piece.traces)


def error(net, problem):
    """Its root mean square in the label measure, and the number of steps."""
    f, steps = run(net)
    square = net.Y.sum(net.Y.weights @ ((f - reference(problem)) ** 2)) / (net.Y.measure * SAMPLES)
    return float(np.sum(square)) ** 0.5, steps


def assert_within(net, problem, tolerance):
    """Each step may err by atol + rtol |f|, |f| < 2 or so, by an estimate that is good to a small factor; errors add up."""
    found, steps = error(net, problem)
    assert found <= 3 * (steps + 2) * tolerance, f"error {found:.1e} after {steps} steps at {tolerance:g}"


# -- every method with an estimate of its error ------------------------------------------------------------------------

KINDS = {
    "rk": ("ts_rk_type", ["2a", "3bs", "5f", "5dp", "5bs", "6vr", "7vr", "8vr"], ["1fe", "2b", "3", "4"]),
    "arkimex": (
        "ts_arkimex_type", ["1bee", "a2", "l2", "ars122", "2c", "2d", "2e", "3", "4", "5"], ["prssp2", "ars443", "bpr3"]
    ),
    "dirk": (
        "ts_dirk_type",
        ["s212", "es122sal", "es213sal", "es324sal", "es325sal", "657a", "es648sa", "658a", "s659a", "7510sal", "es7510sa",
         "759a", "s7511sal", "8614a", "8616sal", "es8516sal"],
        [],
    ),
    "rosw": (
        "ts_rosw_type",
        ["2p", "2m", "ra3pw", "ra34pw2", "r34prw", "r3prl2", "rodas3", "rodaspr", "rodaspr2", "sandu3", "assp3p3s1c",
         "grk4t", "shamp4", "veldd4", "4l"],
        ["theta1", "theta2"],
    ),
    "bdf": ("ts_bdf_order", [2, 3, 4, 5, 6], []),
    "alpha": ("ts_alpha_radius", [0.0, 0.5, 1.0], []),
    "theta": ("ts_theta_theta", [0.5, 0.7, 1.0], []),
    "cn": (None, [None], []),
    "beuler": (None, [None], []),
}  # fmt: skip
ADAPTED = [(name, option, kind) for name, (option, kinds, _) in KINDS.items() for kind in kinds]
UNJUDGED = [(name, option, kind) for name, (option, _, kinds) in KINDS.items() for kind in kinds]


def tolerances(name):
    """Methods of low order make 1 / sqrt(tolerance) steps."""
    return 1e-4 if METHODS[name].estimate == "values" else 1e-5


def adapted(name, option=None, kind=None, tolerance=None, **more):
    tolerance = tolerance or tolerances(name)
    chosen = {} if option is None else {option: kind}
    return {"ts_type": name, "ts_adapt_type": "basic", "ts_rtol": tolerance, "ts_atol": tolerance} | chosen | more


@pytest.mark.parametrize("name, option, kind", ADAPTED, ids=[f"{name} {kind}" for name, _, kind in ADAPTED])
def test_every_method_that_adapts_keeps_to_its_tolerance(name, option, kind):
    assert_within(own_network(**adapted(name, option, kind)), "smooth", tolerances(name))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem != "smooth"])
def test_every_type_adapts_to_stiff_and_overshooting_layers(name, problem):
    assert_within(own_network(problem, **adapted(name)), problem, tolerances(name))


@pytest.mark.parametrize("kind", ["ark3", "lassp3p4s2c", "llssp3p4s2c"])
def test_explicit_stages_between_implicit_ones_want_a_jacobian_a_stage(kind):
    with pytest.raises(ValueError, match=f"'ts_rosw_type' '{kind}' mixes explicit .*'ts_rosw_recompute_jacobian': True"):
        own_network(ts_type="rosw", ts_rosw_type=kind)
    parameters = adapted("rosw", "ts_rosw_type", kind, ts_rosw_recompute_jacobian=True)
    assert_within(own_network(**parameters), "smooth", tolerances("rosw"))


@pytest.mark.parametrize("name, option, kind", UNJUDGED, ids=[f"{name} {kind}" for name, _, kind in UNJUDGED])
def test_methods_without_an_estimate_are_not_adapted(name, option, kind):
    says = f"'ts_adapt_type' 'basic' needs an estimate .* '{name}' with '{option}' '{kind}' does not have; take '{option}'"
    with pytest.raises(ValueError, match=says):
        own_network(**adapted(name, option, kind))


@on_ranks
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.estimate is None])
def test_types_without_an_estimate_are_not_adapted(name):
    says = f"'ts_type' '{name}'( does not have; take 'ts_type'|, got 'ts_adapt_type'; drop it)"
    with pytest.raises(ValueError, match=says):
        own_network(ts_type=name, ts_adapt_type="basic")


# -- every option ------------------------------------------------------------------------------------------------------

#: A value of each option that is none of PETSc's defaults.
VALUES = {
    "ts_max_time": 0.5, "ts_final_time": 0.5, "ts_init_time": 0.1, "ts_time_step": 0.3, "ts_dt": 0.3, "ts_time_span": "0,1",
    "ts_eval_times": "0,1", "ts_run_steps": 1, "ts_max_steps": 5000, "ts_exact_final_time": "stepover", "ts_type": None,
    "ts_adapt_type": "dsp", "ts_rtol": 1e-2, "ts_atol": 1e-2, "ts_adapt_safety": 0.5, "ts_adapt_reject_safety": 0.3,
    "ts_adapt_clip": "0.2,3", "ts_adapt_wnormtype": "infinity", "ts_adapt_scale_solve_failed": 0.5,
    "ts_adapt_time_step_increase_delay": 2, "ts_adapt_dsp_filter": "PI42", "ts_max_step_rejections": 30, "ts_max_reject": 30,
    "ts_max_snes_failures": 5, "ts_adapt_dt_min": 0.25, "ts_adapt_dt_max": 0.1, "ts_adapt_always_accept": True,
    "ts_adapt_max_ignore": 10.0, "ts_adapt_glee_use_local": True, "ts_adapt_dsp_pid": "0,0,0", "ts_adapt_dsp_kbeta": "0,0,0",
    "ts_adapt_dsp_alpha": "1,1", "ts_rk_multirate": True, "ts_rk_dtratio": 2, "ts_use_splitrhsfunction": True,
    "ts_arkimex_fastslowsplit": True, "ts_theta_theta": 0.8, "ts_bdf_order": 3, "ts_rk_type": "3bs", "ts_theta_endpoint": True,
    "ts_theta_initial_guess_extrapolate": True, "ts_arkimex_type": "4", "ts_arkimex_fully_implicit": True,
    "ts_arkimex_initial_guess_extrapolate": True, "ts_dirk_type": "es324sal", "ts_irk_type": "gauss", "ts_irk_nstages": 2,
    "ts_ssp_type": "rks3", "ts_ssp_num_stages": 4, "ts_rosw_type": "rodas3", "ts_rosw_recompute_jacobian": True,
    "ts_bdf_initial_guess_extrapolate": False, "ts_alpha_radius": 0.8, "ts_alpha_alpha_m": 1.0, "ts_alpha_alpha_f": 1.0,
    "ts_alpha_gamma": 1.0, "ts_gl_type": "irks", "ts_gl_complete": "rescale", "ts_gl_error_direction": "backward",
    "ts_gl_extrapolate": True, "ts_gl_max_order": 2, "ts_gl_min_order": 1, "ts_gl_start_order": 2,
    "ts_gl_accept_type": "always", "ts_gl_max_step_rejections": 2, "ts_gl_rtol": 1e-3, "ts_gl_atol": 1e-3,
    "ts_adapt_monitor": False, "ts_error_if_step_fails": True, "ts_view": None, "ts_view_pre": None, "ts_view_solution": None,
    "ts_save_trajectory": True, "ts_trajectory_type": "basic",
}  # fmt: skip
PETSCS_TYPES = [name for name in METHODS if name != "discrete_gradient"]


def refused_or_right(parameters):
    """The message, or None if a network with these options is right; `parameters` says whether steps are adapted."""
    adapts, steps = parameters.get("ts_adapt_type", "none") != "none", 16
    try:
        net = own_network(steps=1 if adapts else steps, **parameters)
    except ValueError as refusal:
        return str(refusal)
    if adapts:
        assert_within(net, "smooth", max(parameters["ts_rtol"], parameters["ts_atol"]))
    else:
        found, made = error(net, "smooth")
        # Of order 1, with steps of 1/10 of the longer layer's time scale.
        assert made == 2 * steps and found < 0.1, f"error {found:.1e} after {made} steps"
    return None


@pytest.mark.whole
@pytest.mark.parametrize("adapts", [False, True], ids=["fixed", "adapted"])
@pytest.mark.parametrize("name", PETSCS_TYPES)
def test_every_option_is_right_or_refused_by_name(name, adapts):
    if adapts and METHODS[name].estimate is None:
        pytest.skip("refused as a whole")
    plain, taken = adapted(name, tolerance=1e-3) if adapts else {"ts_type": name}, []
    for option, value in VALUES.items():
        if option == "ts_type" or (option == "ts_adapt_type" and not adapts):
            continue
        message = refused_or_right(plain | {option: value})
        if message is None:
            taken.append(option)
        else:
            assert option in message and "solver_parameters" in message, message
    assert ("ts_rtol" in taken) == adapts == ("ts_max_steps" in taken)
    assert "ts_error_if_step_fails" in taken and "ts_exact_final_time" not in taken


def test_the_table_has_a_value_of_every_option():
    assert set(VALUES) == set(OPTIONS)


@cache
def petscs_options():
    """All options that PETSc itself says its types ask for."""
    code = (
        "import sys, petsc4py; petsc4py.init(['x', '-help']); from petsc4py import PETSc\n"
        f"for name in {PETSCS_TYPES}:\n"
        "    for rule in ('basic', 'dsp'):\n"
        "        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)\n"
        "        ts.setType(name)\n"
        "        ts.setOptionsPrefix(f'{name}{rule}_')\n"  # else what was told of one type is not told again
        "        if name != 'glle':\n"
        "            PETSc.Options()[f'{name}{rule}_ts_adapt_type'] = rule\n"
        "        ts.setFromOptions()\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without_mpi(), check=True)
    return set(re.findall(r"^ *-[a-z]+_(ts_\w+)", printed.stdout, flags=re.MULTILINE))


def test_every_option_that_petsc_has_is_taken_knowingly_or_refused():
    """The table is held against PETSc's own help: what a new PETSc brings is refused until somebody has thought of it."""
    every = petscs_options()
    assert len(every) > 80 and {"ts_max_steps", "ts_adapt_clip", "ts_rk_type", "ts_gl_rtol"} <= every
    unknown = {name for name in every - set(OPTIONS) if not name.startswith("ts_monitor")}
    assert unknown, "this test says nothing"
    for name in unknown:
        with pytest.raises(ValueError, match=f"solver_parameters: '{name}' '1' is no option that a layer is known to take"):
            refuse_time_options({"ts_type": "rk", name: "1"})


# -- all doors ---------------------------------------------------------------------------------------------------------


@on_ranks
def test_options_of_the_database_are_refused_like_those_of_a_dictionary():
    database = PETSc.Options()
    database["own_ts_exact_final_time"] = "stepover"
    try:
        with pytest.raises(ValueError, match="'ts_exact_final_time' 'stepover' would end a layer elsewhere"):
            own_network(options_prefix="own")
    finally:
        database.delValue("own_ts_exact_final_time")
    # Set later, before the stepper of a batch of another size is made.
    net = own_network()
    late = f"{net.options_prefix}ts_max_steps"
    database[late] = 1
    try:
        with pytest.raises(ValueError, match="'ts_max_steps' '1' would change start, end or steps"):
            run(net)
    finally:
        database.delValue(late)


def test_adaptation_may_come_from_the_database():
    database = PETSc.Options()
    given = {"own_ts_adapt_type": "basic", "own_ts_rtol": 1e-6, "own_ts_atol": 1e-6}
    for name, value in given.items():
        database[name] = value
    try:
        net = own_network(options_prefix="own")
        assert net.solver_parameters["ts_rk_type"] == "5dp"
        assert_within(net, "smooth", 1e-6)
    finally:
        for name in given:
            database.delValue(name)


@on_ranks
def test_fields_are_stepped_to_the_end_too():
    net = own_network()
    f = net.Y.batch(smooth(net.Y, SAMPLES))
    for option, value in (("ts_exact_final_time", "stepover"), ("ts_max_steps", 1), ("ts_rtol", 1e-3)):
        with pytest.raises(ValueError, match=f"'{option}' '{value}"):
            solve_trajectory(net, f, solver_parameters={option: value})


# -- ends --------------------------------------------------------------------------------------------------------------


@on_ranks
def test_a_limit_of_adapted_steps_that_is_reached_is_a_step_failure():
    net = own_network("decay", **adapted("rk"), ts_max_steps=2)
    with pytest.raises(
        StepFailure, match=r"CONVERGED_ITS in layer 0, t = .*: it made 2 steps, and the layer ends at t = 3; .*'ts_max_steps'"
    ):
        run(net)


@on_ranks
@pytest.mark.parametrize("in_time", ["linear", "layers"], ids=["Python", "C"])
def test_a_solve_that_ends_elsewhere_is_a_step_failure(in_time):
    """No option leads there; what else might is seen nevertheless, on all ranks."""
    net = network(steps=4, bias_in_time=in_time)
    first, again = net.Y.batch(smooth(net.Y)), net.Y.batch(0.5 * smooth(net.Y))
    net.run(first)
    (segments,) = net._solver._scratch.values()
    stepper = segments[0].steppers[1]
    if in_time == "linear":
        stepper.solver._max_steps = 2
    else:
        stepper.solver.struct.max_steps = 2
    with pytest.raises(StepFailure, match="CONVERGED_ITS in layer 1, t = 0.55"):
        net.run(again)


# -- rejected steps, and their gradients -------------------------------------------------------------------------------


def damped(size, replay_steps=True, **parameters):
    """f_t = -size B f on one layer, B a projection: what it sees is 0 at the end, the rest stays."""
    phi = laplace("disk", "CG1", 6)
    net = ResidualNetwork(
        phi, layers=1, final_time=1.0, activation="identity", replay_steps=replay_steps, solver_parameters=parameters
    )
    net.kernel.set(0, size * np.eye(6))
    return net


def check_that_what_is_seen_ends_at_zero(kind):
    """The first step overshoots by 300^5 and more; PETSc takes it back by subtraction."""
    net = damped(300.0, ts_rk_type=kind, ts_adapt_type="basic", ts_rtol=1e-6, ts_atol=1e-6)
    f, phi = smooth(net.Y), net.kernel.space_basis.kernel.phi
    final = net.Y.values(net.run(net.Y.batch(f)).final)
    np.testing.assert_allclose(final, f - phi.values @ phi.project(f), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["3bs", "5f", "5bs", "6vr", "7vr", "8vr"])
def test_a_rejected_step_leaves_no_round_off(kind):
    check_that_what_is_seen_ends_at_zero(kind)


@on_ranks
def test_a_rejected_step_leaves_no_round_off_on_ranks():
    check_that_what_is_seen_ends_at_zero("5dp")


def recording(net, annotation):
    """J at recording, J as a function of its controls, and these."""
    initial, target = net.Y.batch(smooth(net.Y)), net.Y.batch(smooth(net.Y, seed=7))
    with annotation():
        J = half_square_distance(net.run(initial).final, target, net.Y)
    reduced = ReducedFunctional(J, [*net.bias.controls(), *net.kernel.controls()])
    return float(J), reduced, [control.tape_value().copy(deepcopy=True) for control in reduced.controls]


def check_that_the_recorded_value_is_that_of_the_same_controls(net, annotation):
    recorded, J, point = recording(net, annotation)
    assert abs(J(point) - recorded) <= 1e-14 * abs(recorded)


@pytest.mark.parametrize("name, size", [("rk", 1000.0), ("arkimex", 1000.0), ("dirk", 1000.0), ("cn", 30.0), ("beuler", 30.0)])
@pytest.mark.parametrize("replay_steps", [True, False])
def test_the_recorded_value_is_that_of_the_same_controls(name, size, replay_steps, annotation):
    net = damped(size, **adapted(name, tolerance=1e-4), replay_steps=replay_steps)
    check_that_the_recorded_value_is_that_of_the_same_controls(net, annotation)


@on_ranks
@pytest.mark.parametrize("name, size, tolerance", [("rk", 100.0, 1e-4), ("cn", 3.0, 1e-2)])
def test_the_recorded_value_is_that_of_the_same_controls_on_ranks(name, size, tolerance, annotation):
    check_that_the_recorded_value_is_that_of_the_same_controls(damped(size, **adapted(name, tolerance=tolerance)), annotation)


@pytest.mark.parametrize("name", ["rk", "cn", "dirk"])
def test_taylor_of_steps_that_were_rejected(name, annotation, rng, taylor):
    net = damped(30.0, **adapted(name, tolerance=1e-3))
    _, J, point = recording(net, annotation)
    direction = [smooth_direction(net, rng, 0, parameter) for parameter in (net.bias, net.kernel)]
    taylor(J, point, direction, f"{name} rejected", "all")


# -- learned times -----------------------------------------------------------------------------------------------------


@on_ranks
@pytest.mark.parametrize("ts_type", ["rk", "discrete_gradient"])
def test_layer_times_that_cross_are_told(ts_type):
    net = network(learn_times=True, solver_parameters={"ts_type": ts_type})
    net.layer_times.set(0, [0.5, 0.3, 1.0])
    says = r"layer 1, t = 0.5: expected layer times that increase, got t_1 = 0.5 and t_2 = 0.3; learn from .*'layer_times'"
    with pytest.raises(StepFailure, match=says) as caught:
        net.run(net.Y.batch(smooth(net.Y)))
    assert (caught.value.layer, caught.value.reason) == (1, "LENGTH_NOT_POSITIVE")
    assert "smaller parameters" not in str(caught.value)
