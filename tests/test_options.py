"""Options of PETSc are looked at where they enter, and refused where nothing asks for them, at all doors alike."""

import numpy as np
import pytest
from helpers import flat_network, label_space, laplace
from petsc4py import PETSc
from problems import learning_problem, network

from fem_resnet import laplace_basis, train, train_pam
from fem_resnet.options import checked_options, checked_prefix, refuse_unread
from fem_resnet.training.tao_types import TYPES

on_ranks = pytest.mark.parallel([1, 2, 3])


def problem():
    return learning_problem(network("disk", "CG1"))


def train_once(parameters, **options):
    return train(problem(), {"tao_max_it": 1} | parameters, monitor=lambda progress: True, **options)


def train_blocks_once(parameters, **options):
    return train_pam(problem(), parameters, iterations=0, monitor=lambda progress: True, **options)


def functions(parameters, **options):
    return laplace_basis(label_space("disk", "CG1"), 2, solver_parameters=parameters, **options)


def stepped(parameters, **options):
    return flat_network(laplace("disk", "CG1", 4), layers=1, solver_parameters=parameters, **options)


#: Doors that take options, with options that nothing reads, though PETSc knows some of them in other places.
UNREAD = {
    "train": (train_once, [{"tao_maxit": 3}, {"tao_nls_ksp_rtol": 0.1}, {"tao": {"bnk_ksp_rtol": 0.1}}, {"ksp_rtol": 0.1}]),
    "train, matrix": (
        train_once,
        [{"tao_type": "nls", "tao_lmvm_mat_lmvm_hist_size": 3}, {"tao_blmvm_mat_lmvm_hist_size": 3}],
    ),
    "train_pam": (train_blocks_once, [{"tao_maxit": 3}, {"tao_ntr_ksp_rtol": 0.1}]),
    "laplace_basis": (functions, [{"eps_maxit": 3}, {"st_ksp_rtoll": 0.1}, {"tao_max_it": 3}]),
    "rk": (stepped, [{"snes_rtol": 0.1}, {"ksp_rtol": 0.1}, {"tao_max_it": 3}]),
    "cn": (stepped, [{"ts_type": "cn", "snes_rtoll": 0.1}, {"ts_type": "cn", "ksp_rtoll": 0.1}]),
    "discrete_gradient": (stepped, [{"ts_type": "discrete_gradient", "snes_rtoll": 0.1}]),
}


@on_ranks
@pytest.mark.parametrize("door", UNREAD)
def test_options_that_nothing_reads_are_refused_by_name(door):
    call, unread = UNREAD[door]
    for parameters in unread:
        name = list(checked_options(parameters))[-1]
        with pytest.raises(ValueError, match=f"^solver_parameters: .*{name}"):
            call(parameters)


@pytest.mark.parametrize("kind", TYPES)
def test_options_of_each_type_of_tao_are_read(kind):
    newton = TYPES[kind].newton
    own = "tao_ls_ftol" if newton is None else f"tao_{newton}_ksp_rtol"
    parameters = {"tao_type": kind, "tao_gatol": 1e-9, "tao_view": None, own: 0.1}
    assert train_once(parameters).reason == "STOPPED"


def test_options_that_are_read_when_there_is_something_to_see_are_left_alone(capfd):
    train_once({"tao_view": None, "tao_monitor": None})
    functions({"eps_view": None, "eps_converged_reason": None})
    assert "Tao Object" in capfd.readouterr().out


#: Values that PETSc would take, or end the program at.
BAD = {
    "train": (train_once, [{"tao_gatol": np.nan}, {"tao_gatol": "nan"}, {"tao_ls_type": "nothing"}, {"tao_max_it": 10**30}]),
    "train_pam": (train_blocks_once, [{"tao_grtol": np.nan}, {"tao_max_it": -1}]),
    "laplace_basis": (functions, [{"eps_tol": np.nan}, {"eps_type": "nothing"}]),
    "network": (stepped, [{"ts_type": "cn", "snes_rtol": np.nan}, {"ts_rk_type": "nothing"}]),
}


@on_ranks
@pytest.mark.parametrize("door", BAD)
def test_values_that_options_cannot_have_are_refused(door):
    call, bad = BAD[door]
    for parameters in bad:
        with pytest.raises(ValueError, match="^solver_parameters: "):
            call(parameters)


@pytest.mark.parametrize("call", [train_once, train_blocks_once, functions, stepped])
def test_prefixes_are_looked_at(call):
    for wrong in (3, b"mine", ["mine"]):
        with pytest.raises(TypeError, match="^options_prefix: expected a str or None"):
            call({}, options_prefix=wrong)
    for wrong in ("mine_ ", "-mine", "3mine", "my net", "mine\n"):
        with pytest.raises(ValueError, match="^options_prefix: expected a letter, then letters, digits"):
            call({}, options_prefix=wrong)


def test_options_are_flat_and_prefixes_as_they_were():
    assert checked_options({"a": {"b_": {"c": 1}, "d": None}, "e_python_type": int}) == {
        "a_b_c": 1,
        "a_d": None,
        "e_python_type": int,
    }
    assert (
        checked_options(None) == {}
        and checked_prefix(None) is None
        and checked_prefix("") == ""
        and checked_prefix("a.b-c_") == "a.b-c_"
    )
    for wrong, error in (
        ({"-tao_type": "lmvm"}, ValueError), ({3: 1}, ValueError), ({"a": 1j}, TypeError), ({"a": [1]}, TypeError),
        ({"a": int}, TypeError),
        ([("a", 1)], TypeError), ("a", TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="^given: "):
            checked_options(wrong, "given")


def test_an_option_of_the_command_line_counts_as_read_where_it_is():
    options = PETSc.Options()
    options["mine_tao_max_it"] = 1
    try:
        assert train(problem(), {"tao_max_it": 7}, options_prefix="mine", monitor=lambda progress: None).iterations == 1
    finally:
        options.delValue("mine_tao_max_it")


def test_a_misspelled_option_has_the_nearest_name_beside_it():
    with pytest.raises(ValueError, match=r"got tao_maxit; correct the name \(did you mean 'tao_max_it'\?\), or leave it out$"):
        refuse_unread(["tao_maxit"], "TAO's 'lmvm'")
    with pytest.raises(ValueError, match="got quite_another; correct the name, or leave it out$"):
        refuse_unread(["quite_another"], "TAO's 'lmvm'")
