"""Tools of control, co-state and theory take the options of PETSc that they ask for, and refuse all others."""

import pytest
from doors_of_theory import euler, field, net, one_sample, problem, strict, trajectory
from helpers import label_space

from fem_resnet import (
    LocalFeedback,
    compress,
    costate_check,
    depth_limit,
    duhamel,
    follow_trajectory,
    hessian_spectrum,
    solve_costate,
    solve_linearised,
    solve_trajectory,
    weighted_identity,
)  # fmt: skip


def of_kernel(solver_parameters):
    return compress(
        lambda y, z: 1 / (1 + ((y - z) ** 2).sum(axis=-1)),
        0.1,
        label_space("disk", "CG1"),
        solver_parameters=solver_parameters,
    )


#: Each tool with options: the call, some that it reads, some that nobody does.
TS = {"ts_type": "theta", "ts_theta_theta": 0.5, "ksp_rtol": 1e-12, "snes_max_it": 20}, {"ts_type": "rk", "tao_max_it": 3}
TOOLS = {
    "solve_trajectory": (lambda o: solve_trajectory(net(), field(), steps=2, solver_parameters=o), *TS),
    "follow_trajectory": (lambda o: follow_trajectory(net(), field(), lambda *_: None, solver_parameters=o), *TS),
    "solve_costate": (lambda o: solve_costate(trajectory(), field(3), solver_parameters=o), *TS),
    "costate_check": (lambda o: costate_check(one_sample(), refinements=(1,), steps=2, solver_parameters=o), *TS),
    "solve_linearised": (lambda o: solve_linearised(trajectory(), field(3), solver_parameters=o), *TS),
    "duhamel": (lambda o: duhamel(trajectory(), [*net().bias.functions, *net().kernel.functions], solver_parameters=o), *TS),
    "weighted_identity": (lambda o: weighted_identity(trajectory(), field(3), solver_parameters=o), *TS),
    "depth_limit": (lambda o: depth_limit(euler(), field(), halvings=0, solver_parameters=o), *TS),
    "hessian_spectrum": (
        lambda o: hessian_spectrum(problem(), 1, solver_parameters=o),
        {"eps_type": "arnoldi", "eps_ncv": 12},
        {"eps_maxit": 3},
    ),
    "LocalFeedback": (
        lambda o: LocalFeedback(strict(), solver_parameters=o),
        {"ksp_type": "minres", "ksp_max_it": 9},
        {"ksp_maxit": 3},
    ),
    "compress": (of_kernel, {"svd_type": "trlanczos", "svd_ncv": 40}, {"svd_maxit": 3}),
}


@pytest.mark.parametrize("name", TOOLS)
def test_options_that_a_tool_reads_are_taken_and_others_refused(name):
    call, read, unread = TOOLS[name]
    call(read)
    with pytest.raises(ValueError, match=rf"^solver_parameters: expected an option of .*, got {list(unread)[-1]};"):
        call(unread)
    for wrong in ({"ts_type": 1j}, {3: 4}, [("ksp_rtol", 1.0)], {"ksp_rtol": float("nan")}):
        with pytest.raises((TypeError, ValueError), match="^solver_parameters: "):
            call(wrong)


def test_what_petsc_says_of_an_option_is_passed_on():
    with pytest.raises(ValueError, match="^solver_parameters: PETSc refuses .*lanczos.*You should explicitly provide"):
        hessian_spectrum(problem(), 1, solver_parameters={"eps_type": "lanczos"})
