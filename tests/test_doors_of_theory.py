"""No public method of the classes of control, co-state and theory is left out of the walk over the doors."""

import inspect

import doors_of_theory
import numpy as np
import pytest

import fem_resnet
from fem_resnet import (
    Hamiltonian,
    RowBall,
    RowBox,
    autonomous_problem,
    find_steady_states,
    get_activation,
    msa,
    picard,
    pmp_residual,
    raise_controls,
    solve_trajectory,
    train,
    well_posedness_constants,
)  # fmt: skip


def test_each_method_with_arguments_has_a_row():
    known = {name.split(".")[0] for name in doors_of_theory.DOORS} | set(doors_of_theory.NO_DOORS)
    classes = [kind for name in sorted(known) if inspect.isclass(kind := getattr(fem_resnet, name))]
    lacking = []
    for kind in classes:
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", member)
            if not inspect.isfunction(function) or name.startswith("_") and name not in ("__call__", "__matmul__"):
                continue
            takes = len(inspect.signature(function).parameters) > 1
            if (
                takes
                and not getattr(function, "__isabstractmethod__", False)
                and f"{kind.__name__}.{name}" not in doors_of_theory.DOORS
            ):
                lacking.append(f"{kind.__name__}.{name}")
    assert len(classes) > 40 and not lacking


@pytest.mark.parametrize("tool", [autonomous_problem, well_posedness_constants, solve_trajectory, pmp_residual, msa, train])
def test_a_first_argument_that_is_no_network_or_problem_is_refused_whatever_the_others_are(tool):
    name, kind = next(iter(inspect.signature(tool).parameters)), {"net": "ResidualNetwork", "problem": "LearningProblem"}
    others = [None] * (tool not in (autonomous_problem, well_posedness_constants, train))
    for wrong in (None, 3, doors_of_theory.phi()):
        with pytest.raises(TypeError, match=f"^{name}: expected a {kind[name]}, got {type(wrong).__name__}"):
            tool(wrong, *others)


def test_sets_of_rows_and_hamiltonians_are_made_of_what_they_are_made_of():
    for make in (lambda: RowBox(3, (0, 1), (0, 1)), lambda: RowBall("psi", 1.0)):
        with pytest.raises(TypeError, match="^psi: expected a Basis"):
            make()
    with pytest.raises(TypeError, match="^Y: expected a LabelSpace, got Basis"):
        Hamiltonian(doors_of_theory.phi(), get_activation("tanh"), "minimise")
    with pytest.raises(TypeError, match="^activation: expected an Activation, got str"):
        Hamiltonian(doors_of_theory.Y(), "tanh", "minimise")
    with pytest.raises(TypeError, match="^H: expected a Hamiltonian, got int"):
        raise_controls(3, None, None, None)


def test_tolerances_that_are_no_numbers_are_refused():
    for call in (
        lambda t: find_steady_states(doors_of_theory.euler(), tolerance=t),
        lambda t: picard(doors_of_theory.euler(), doors_of_theory.field(), tolerance=t),
        lambda t: pmp_residual(doors_of_theory.one_sample(), doors_of_theory.box(), tolerance=t),
    ):
        for wrong in (np.nan, np.inf, 1j, "1e-8"):
            with pytest.raises(ValueError, match="^tolerance: expected a number >= 0"):
                call(wrong)
