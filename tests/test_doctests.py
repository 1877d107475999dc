"""The examples in the docstrings do what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import fem_resnet

#: They list what there is.
pytestmark = pytest.mark.whole

PACKAGE = Path(fem_resnet.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text()
]
#: tests/external/test_pages.py has those on PyTorch and JAX; that of exports reads a file that is not there.
ELSEWHERE = ("fem_resnet.external.torch", "fem_resnet.external.jax", "fem_resnet.export.torch_module")
MODULES = [name for name in MODULES if name not in ELSEWHERE]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in(name, capsys):
    module = import_module(name.removesuffix(".__init__"))
    examples = sum(len(test.examples) for test in doctest.DocTestFinder().find(module))
    assert examples > 0, f"{name} has examples that doctest does not find"
    assert doctest.testmod(module).failed == 0, capsys.readouterr().out


def test_some_modules_have_examples():
    assert MODULES
