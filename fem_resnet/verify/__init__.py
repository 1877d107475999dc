"""Verification of a learning problem: `verify(problem)`, and `python -m fem_resnet.verify` for files and modules."""

import sys
from types import ModuleType

from fem_resnet.verify.problems import BUILT_IN, built_in
from fem_resnet.verify.report import Check, Line, Report
from fem_resnet.verify.suite import problem_of, verify

__all__ = ["BUILT_IN", "Check", "Line", "Report", "built_in", "problem_of", "verify"]


class _Callable(ModuleType):
    """Folder and function have one name: `fem_resnet.verify` is both, whichever was imported first."""

    def __call__(self, *arguments, **options):
        return verify(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
