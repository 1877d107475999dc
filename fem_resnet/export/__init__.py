"""Networks for programs without Firedrake: `export` writes arrays with a predictor, or ONNX; `torch_module` reads arrays.

`arrays` says what is written, `predict` what is made of it. That one file is the whole algorithm: with NumPy it predicts,
with PyTorch it is a module (`torch_module`), and with symbols in place of arrays it is written down as ONNX (`onnx_graph`).
`predict` needs nothing but NumPy, `torch_module` PyTorch too; Firedrake and PETSc are needed where a network is exported.
"""

import sys
from importlib import import_module
from types import ModuleType


class _Callable(ModuleType):
    """`fem_resnet.export` is this folder and the function, whichever is imported first."""

    def __call__(self, *arguments, **options):
        return import_module(f"{__name__}.writing").export(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
