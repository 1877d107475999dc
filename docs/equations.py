"""The mathematics next to the code: a table of numbered equations and statements, the code that names them, its tests.

A docstring that names a number, as in "solve (2.8)", "(4.2a)", "(4.2) - (4.4)", "Theorem 3.2", "(A1) of 3.2", stands
for what it belongs to. `SHOWN` says which test shows a number; its docstring or a comment in it names the number too.

    containers/run python docs/equations.py            prints the page
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from package import ROOT, docstrings, documented, exports, role

#: Every number of the paper by section; the letters of an equation's parts behind it.
EQUATIONS = {
    "2.1": "2.1 2.2ab 2.3ab 2.4ab 2.5ab 2.6ab 2.7ab",
    "2.2": "2.8 2.9",
    "2.3": "2.10ab",
    "2.4": "2.11a",
    "3.1": "3.1",
    "3.2": "3.2ab 3.3 3.4",
    "3.3": "3.5ab",
    "3.5": "3.6",
    "4.1": "4.1ab 4.2ab 4.3 4.4 4.5 4.6 4.7ab",
    "4.2": "4.8 4.9 4.10ab",
    "4.3": "4.11 4.12",
    "5.1": "5.1ab",
}
STATEMENTS = {
    "2.1": ["(A1) of 2.1", "(A2) of 2.1", "Theorem 2.1", "(A3) of 2.1", "Theorem 2.2"],
    "3.1": ["Assumption 1", "Theorem 3.1"],
    "3.2": ["(A1) of 3.2", "(A2) of 3.2", "Remark 3.1", "Theorem 3.2"],
    "3.3": ["Lemma 3.3", "Theorem 3.4"],
    "3.4": ["Proposition 3.5"],
    "4.1": ["Proposition 4.1", "Remark 4.1", "Remark 4.2"],
    "4.2": ["Remark 4.3"],
    "4.3": ["Theorem 4.2", "Remark 4.4", "Theorem 4.3"],
    "5.1": ["Algorithm 1"],
    "5.2": ["Algorithm 2"],
}
#: The test that shows each number; a part of an equation without a row of its own is shown by that of the whole.
SHOWN = {
    "(2.1)": "test_one_euler_step_a_layer_with_cell_indicators_is_the_residualnetwork",
    "(2.2)": "test_z_tau_is_the_extended_recursion",
    "(2.2b)": "test_a_network_of_L_layers_takes_L_steps_and_moves_in_the_first",
    "(2.3)": "test_depth_converges_at_order_one",
    "(2.4)": "test_a_network_of_arrays_is_one_on_any_partition",
    "(2.5)": "test_a_network_of_arrays_is_one_on_any_partition",
    "(2.6)": "test_the_ode_on_cubes_and_the_equation_with_kernel_values_are_one",
    "(2.7)": "test_the_ode_on_cubes_and_the_equation_with_kernel_values_are_one",
    "(2.8)": "test_order_in_time",
    "(2.9)": "test_head_is_the_integral_of_the_final_state_against_w",
    "(2.10)": "test_j_is_the_loss_of_the_output_and_the_regulariser",
    "(2.11)": "test_tikhonov_is_half_the_square_of_all_norms_in_label_domain_and_time",
    "(3.1)": "test_random_pairs_of_solutions_part_by_no_more_than_the_estimate",
    "(3.2)": "test_f_drifts_for_ever_where_u_stands_still",
    "(3.3)": "test_f_drifts_for_ever_where_u_stands_still",
    "(3.4)": "test_each_condition_is_flagged_with_its_reason",
    "(3.5)": "test_the_spectrum_on_the_range_is_that_of_D_T_transposed_and_of_D_T",
    "(3.6)": "test_the_discrete_flow_is_that_of_3_6_to_the_order_of_the_scheme",
    "(4.1)": "test_trajectory_and_network_make_the_same_steps",
    "(4.2)": "test_costate_and_gradient_agree_on",
    "(4.2b)": "test_terminal_values_of",
    "(4.3)": "test_gradients_of_explicit_euler_are_those_of_section_4",
    "(4.4)": "test_gradients_of_explicit_euler_are_those_of_section_4",
    "(4.5)": "test_at_a_reached_target_the_gradient_vanishes",
    "(4.6)": "test_tikhonov_is_half_the_square_of_all_norms_in_label_domain_and_time",
    "(4.7)": "test_gradient_of_tikhonov_is_lambda_times_the_parameters",
    "(4.8)": "test_extremal_controls_are_of_rank_two_in_A_and_reach_the_bound",
    "(4.9)": "test_extremes_of_T_are_those_over_all_controls",
    "(4.10)": "test_extremal_controls_are_determined_where_the_costate_is_not_zero",
    "(4.11)": "test_the_dynamic_programming_identity",
    "(4.12)": "test_on_one_cell_it_is_the_distance_of_the_target_from_the_reachable_interval",
    "(5.1)": "test_each_group_solves_its_proximal_problem_in_its_turn",
    "(A1) of 2.1": "test_growth_is_bounded_in_the_size_of_s",
    "(A2) of 2.1": "test_coefficients_without_a_bound_have_another_limit_than_their_pointwise_one",
    "Theorem 2.1": "test_z_tau_converges_uniformly_in_t_at_order_one",
    "(A3) of 2.1": "test_kernels_without_a_bound_have_another_limit_than_their_pointwise_one",
    "Theorem 2.2": "test_width_converges_strongly_at_order_one_and_two_against_cell_means",
    "Assumption 1": "test_an_activation_that_is_not_lipschitz_is_refused",
    "Theorem 3.1": "test_the_iteration_ends_at_the_solution",
    "(A1) of 3.2": "test_what_of_the_assumptions_on_sigma_does_not_hold_is_named",
    "(A2) of 3.2": "test_constants_are_those_of_functions_and_not_of_a_mesh",
    "Remark 3.1": "test_a_network_with_limits_behaves_as_the_limit_says",
    "Theorem 3.2": "test_theorem_3_2_and_the_bounds_before_it_hold_where_they_apply",
    "Lemma 3.3": "test_equilibria_of_a_symmetric_operator_vanish_where_sigma_does_not",
    "Theorem 3.4": "test_the_rate_is_the_least_real_part_of_the_spectrum_of_D_T",
    "Proposition 3.5": "test_proposition_3_5_holds_with_its_constants",
    "Proposition 4.1": "test_at_a_reached_target_the_gradient_vanishes",
    "Remark 4.1": "test_relu_below_its_kink_is_stationary",
    "Remark 4.2": "test_the_regulariser_has_a_factor_one_half",
    "Remark 4.3": "test_terminal_costate_of_a_head_is_the_residual_through_w",
    "Theorem 4.2": "test_the_dynamic_programming_identity",
    "Remark 4.4": "test_the_characteristics_are_the_system_of_the_maximum_principle",
    "Theorem 4.3": "test_the_closed_loop_costs_what_the_value_function_says",
    "Algorithm 1": "test_the_inequality_below_5_1_holds_at_every_iteration_for_any_tau",
    "Algorithm 2": "test_basic_msa_is_the_algorithm_as_printed",
}
# Equation (4.2) with its parts: {"(4.2)": "ab"}, in the paper's order.
PARTS = {f"({name.rstrip('ab')})": name.lstrip("0123456789.") for row in EQUATIONS.values() for name in row.split()}
_ORDER = list(PARTS)

_ONE = r"\((\d\.\d+)([a-d]?)\)"
_EQUATIONS = re.compile(rf"(?<![\w.)\]]){_ONE}(?:\s*(?:-|–|to)\s*{_ONE})?")
_LIST = re.compile(r"(?<![\w.)\]])\((\d\.\d+[a-d]?(?:,\s+\d\.\d+[a-d]?)+)\)")
_STATEMENT = re.compile(
    r"\b(Theorem|Proposition|Lemma|Remark|Algorithm|Assumption)s?\s+(\d(?:\.\d+)?)(?:\s*(?:,|and|to)\s+(\d\.\d+))?"
)
_ASSUMPTION = re.compile(r"\(A_?([123])\)\s+(?:of|in)\s+(?:section\s+)?(2\.1|3\.2)")


class Reference(NamedTuple):
    """A numbered equation or statement, and the part of it that is named: ("(4.2)", "b")."""

    number: str
    part: str = ""


def references(text: str) -> set[Reference]:
    """The numbers of the paper that a text names."""
    found = set()
    for first, part, last, last_part in _EQUATIONS.findall(text):
        found |= {Reference(f"({first})", part), Reference(f"({last or first})", last_part if last else part)}
        ends = [_ORDER.index(f"({number})") for number in (first, last) if f"({number})" in PARTS]
        found |= {Reference(number) for number in _ORDER[min(ends, default=0) + 1 : max(ends, default=0)]}
    for numbers in _LIST.findall(text):
        listed = {Reference(f"({name.rstrip('abcd')})", name.lstrip("0123456789.")) for name in re.split(r",\s+", numbers)}
        found |= listed if all(reference.number in PARTS for reference in listed) else set()
    for kind, *numbers in _STATEMENT.findall(text):
        found |= {Reference(f"{kind} {number}") for number in numbers if number}
    found |= {Reference(f"(A{number}) of {section}") for number, section in _ASSUMPTION.findall(text)}
    known = PARTS.keys() | {name for names in STATEMENTS.values() for name in names}
    return {reference for reference in found if reference.number in known}


@cache
def in_code() -> dict[str, list[tuple[str, str, str]]]:
    """Who names a number: module, qualified name and part of the equation."""
    found = defaultdict(list)
    for module, name, text in docstrings():
        for reference in sorted(references(text)):
            found[reference.number].append((module, name, reference.part))
    return found


class Test(NamedTuple):
    """A test: its file, relative to tests/, its text with decorators and comments, and the numbers that this names."""

    file: str
    text: str
    names: frozenset[str]


@cache
def tests() -> dict[str, Test]:
    """All tests by name, wherever below tests/ they stand; one of two tests of a name is left out."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text()
        lines, comments = source.splitlines(), _comments(source)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                first, last = _first_line(node), node.end_lineno
                words = [ast.get_docstring(node) or "", *(text for line, text in comments if first <= line <= last)]
                names = frozenset(reference.number for text in words for reference in references(text))
                found[node.name] = Test(str(path.relative_to(ROOT / "tests")), "\n".join(lines[first - 1 : last]), names)
    return found


def _first_line(test):
    return min(node.lineno for node in [test, *test.decorator_list])


def _comments(source):
    """First line and text of the comments; lines below each other are one."""
    last = -1
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#: ")
            if token.start[0] == last + 1:
                comments[-1] = (comments[-1][0], f"{comments[-1][1]}\n{text}")
            else:
                comments.append((token.start[0], text))
            last = token.start[0]
    return comments


def shown_by(name: str) -> str | None:
    """The test that shows a number or a part of it, "(4.2b)"; None where none is named that exists and names it too."""
    number = _number(name)
    test = SHOWN.get(name) or SHOWN.get(number)
    return test if test in tests() and number in tests()[test].names else None


def _number(name):
    """(4.2) of (4.2b)."""
    whole = re.sub(r"[ab]\)$", ")", name)
    return whole if whole in PARTS else name


def names() -> list[str]:
    """All numbers of the paper, of equations with their parts: (4.2a), (4.2b)."""
    return [name for number in _ORDER + [name for names in STATEMENTS.values() for name in names] for name in _printed(number)]


def gaps() -> list[str]:
    """The numbers that lack a public class or function that names them, or a test that shows them."""
    return [name for name in names() if not (_is_named(_number(name), name) and shown_by(name))]


def pages() -> dict[str, str]:
    """Page texts by file name."""
    equations = [(section, f"({name.rstrip('ab')})") for section, row in EQUATIONS.items() for name in row.split()]
    statements = [(section, name) for section, names in STATEMENTS.items() for name in names]
    text = f"""# The mathematics next to the code

The numbers are those of H. Liu and P. Markowich, *Selection dynamics for deep neural networks*. The column "code" lists
what names the number in its docstring: public names if there are any, otherwise modules. The test in the column "shown by"
names the number too, and fails if the statement does not hold. The page is made from the sources:
{len(names()) - len(gaps())} of {len(names())} numbers have code and such a test.
Measurements are in [Sections 2 to 5](../explanation/theory.md).

## Equations

{_table(equations)}

## Statements, assumptions and algorithms

{_table(statements)}
"""
    return {"equations.md": text}


def _printed(number):
    """The names of a number's parts: (4.2a) and (4.2b) of (4.2)."""
    return [f"{number[:-1]}{part})" for part in PARTS.get(number, "")] or [number]


def _is_named(number, name):
    parts = {part for module, code, part in in_code().get(number, ()) if code != module and code in documented()}
    return "" in parts or bool(PARTS.get(number)) and name[-2] in parts


def _table(rows):
    lines = ["| number | section | code | shown by | named in |", "|---|---|---|---|---|"]
    for section, number in rows:
        named = _by_name(in_code().get(number, []))
        public = {place: parts for place, parts in named.items() if place[1].split(".")[-1] in _exported()}
        code = [
            role(name, module, name.split(".")[-1] if public else None)
            + (f" ({', '.join(sorted(filter(None, parts)))})" if any(parts) else "")
            for (module, name), parts in (public or named).items()
        ]
        shown = dict.fromkeys(filter(None, map(shown_by, _printed(number))))
        others = sum(number in test.names for name, test in tests().items() if name not in shown)
        cells = [f"`{tests()[name].file}`<br>`{name}`" for name in shown]
        also = f"{others} other tests" if others > 1 else "1 other test" if others else ""
        lines.append(f"| {', '.join(_printed(number))} | {section} | {'<br>'.join(code)} | {'<br>'.join(cells)} | {also} |")
    return "\n".join(lines)


@cache
def _exported():
    return {name for names in exports().values() for name in names}


def _by_name(found):
    by_name = defaultdict(set)
    for module, name, part in found:
        by_name[module, name].add(part)
    return by_name


if __name__ == "__main__":
    print(pages()["equations.md"])
