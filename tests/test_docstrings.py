"""docs/check_docstrings.py finds each fault of a docstring, and none in the package."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "check_docstrings.py"
_spec = importlib.util.spec_from_file_location("check_docstrings", SCRIPT)
check_docstrings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_docstrings)

SOUND = '''
"""A module."""

__all__ = ["Thing", "scaled"]


def scaled(values: ArrayLike, factor: float, *others: float, power: int = 1) -> np.ndarray:
    """The values times a factor.

    Parameters
    ----------
    values
        The values, shape (nodes,).
    factor, *others
        The factors; no unit.
    power
        Their power.

    Returns
    -------
    ndarray
        Of the shape of the values.

    Raises
    ------
    ValueError
        If the factor is not positive.
    """
    if number("factor", factor) <= 0:
        raise ValueError("factor: expected a positive number")
    return values * factor


class Thing(Base):
    """A thing.

    Parameters
    ----------
    name
        Its name.
    size
        Its size.
    """

    def __init__(self, name: str, size: float):
        self.name, self.size = name, size

    def doubled(self) -> float:
        """Twice the size."""
        return 2 * self.size

    @property
    def values(self) -> np.ndarray:
        """Its values, shape (nodes,)."""
        return self._values

    def inherits_its_docstring(self):
        return None

    def _private(self, a, b):
        raise ValueError


def _helper(a, b):
    raise ValueError
'''

#: Of the sound source: what is replaced, by what, and the fault that is found then.
FAULTS = {
    "no docstring": ('    """Twice the size."""\n', "", None),
    "no docstring, no base": (
        "class Thing(Base):",
        "class Thing:",
        "Thing.inherits_its_docstring has no docstring",
    ),
    "no summary": ('"""The values times a factor.\n\n', '"""\n', "scaled has no summary"),
    "a parameter is missing": ("    power\n        Their power.\n", "", "scaled does not document its argument power"),
    "a parameter of another name": (
        "    size\n        Its size.\n",
        "    sizes\n        Its size.\n",
        "Thing does not document",
    ),
    "others are missing": ("factor, *others", "factor", "scaled does not document its argument others"),
    "no shape of an argument": ("The values, shape (nodes,).", "The values.", "scaled does not say the shape of values"),
    "no shape of the result": ("Its values, shape (nodes,).", "Its values.", "Thing.values does not say the shape of what"),
    "no Raises": (
        "    Raises\n    ------\n    ValueError\n        If the factor is not positive.\n",
        "",
        "scaled does not say what it raises",
    ),
    "no Raises for a check": (
        "return 2 * self.size",
        'return integer("size", self.size)',
        "Thing.doubled does not say what it raises",
    ),
}


def _faults(source: str) -> list[str]:
    """What the script finds in a source, all of whose names users import."""
    return [
        f"{name} {fault}"
        for name, function, docstring in check_docstrings.public(ast.parse(source))
        for fault in check_docstrings.faults(function, docstring, for_users=True)
    ]


def test_a_sound_source_has_no_fault():
    assert _faults(SOUND) == []


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name):
    right, wrong, fault = FAULTS[name]
    assert right in SOUND
    found = _faults(SOUND.replace(right, wrong))
    if fault is None:  # a method of a derived class may inherit its docstring
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith(fault), found


def test_names_that_users_do_not_import_need_a_summary_alone():
    public = {name: (function, docstring) for name, function, docstring in check_docstrings.public(ast.parse(SOUND))}
    function, _ = public["scaled"]
    assert not list(check_docstrings.faults(function, "The values times a factor.", for_users=False))
    assert list(check_docstrings.faults(function, None, for_users=False)) == ["has no docstring"]


def test_errors_of_functions_inside_are_not_those_of_the_function():
    inside = "def doubled(self):\n    def fail():\n        raise ValueError\n    return fail"
    assert not check_docstrings._raises(ast.parse(inside).body[0])


def test_the_names_that_users_import_are_read_from_the_package():
    assert {"ResidualNetwork", "save", "load", "verify"} <= check_docstrings.face()


def test_the_package_has_no_fault():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == ""


def test_the_script_reads_sources_and_loads_neither_the_package_nor_petsc(tmp_path):
    (tmp_path / "module.py").write_text(SOUND)
    code = (
        f"import runpy, sys; sys.argv = ['check', {str(tmp_path / 'module.py')!r}]\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'fem_resnet', 'petsc4py', 'firedrake'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
