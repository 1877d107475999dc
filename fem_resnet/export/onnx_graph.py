"""An exported network as a graph of ONNX: `predict` runs on symbols in place of arrays, which write down what they are asked.

A symbol is a value of the graph. Its shape is known but for the number of samples, its first axis. What is known beforehand,
such as coefficients at the time of a stage, stays NumPy and becomes a constant.

ONNX Runtime has no arctan, asinh, cos, tan, sinh, cosh and erf of doubles. These are made of functions that it has: the
hyperbolic ones by exponentials, cos and tan by sines, asinh by a logarithm, arctan by halving the angle three times and its
power series. erf has no such form to all digits, and is refused in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fem_resnet.export import predict

__all__ = ["onnx_model"]

#: Operations up to this version are used; it has all of them in double precision, and old readers know it.
_OPSET = 17
#: The newest version of the file format that readers of that time know.
_IR = 8


def onnx_model(arrays: Mapping[str, np.ndarray], precision: str) -> onnx.ModelProto:
    """The graph, from "inputs" to "output", O, and "prediction", h(O).

    Parameters
    ----------
    arrays
        From `network_arrays`.
    precision
        "double" or "single": of inputs, constants and results.

    Raises
    ------
    ValueError
        If the activation has a function that ONNX has not in this precision.
    """
    graph = _Graph(np.float64 if precision == "double" else np.float32)
    net = {name: graph.constant_array(array) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    net |= {name: arrays[name] for name in arrays if name.endswith("_in_time") or name in ("A", "b", "times")}
    fields = arrays["V"].shape[1] * len(arrays["coordinates"]) if "V" in arrays else len(arrays["weights"])
    u = graph.input("inputs", (fields,))
    outputs = {"output": predict.output(net, u, graph), "prediction": predict.predict(net, u, graph)}
    return graph.model({name: graph.symbol(value) for name, value in outputs.items()})


class _Symbol:
    """A value of a graph, shape (samples, ..)."""

    __array_ufunc__ = None  # NumPy leaves operators between its arrays and symbols to the symbols

    def __init__(self, graph: _Graph, name: str, shape: tuple[int, ...]):
        self._graph, self.name, self.shape = graph, name, shape

    def __add__(self, other):
        return self if _is_zero(other) else self._graph.node("Add", self, other)

    def __radd__(self, other):
        return self + other

    def __sub__(self, other):
        return self._graph.node("Sub", self, other)

    def __rsub__(self, other):
        return self._graph.node("Sub", other, self)

    def __mul__(self, other):
        return self._graph.node("Mul", self, other)

    def __rmul__(self, other):
        return self if isinstance(other, int) and other == 1 else self._graph.node("Mul", self, other)

    def __truediv__(self, other):
        return self._graph.node("Div", self, other)

    def __pow__(self, other):
        return self._graph.node("Pow", self, other)

    def __rpow__(self, other):
        return self._graph.exp(self * math.log(other))

    def __matmul__(self, other):
        shape = (*self.shape[:-1], other.shape[-1])
        return self._graph.node("MatMul", self, other, shape=shape)

    def __rmatmul__(self, other):
        shape = (*self.shape[:-2], other.shape[0], self.shape[-1])
        return self._graph.node("MatMul", other, self, shape=shape)

    def __le__(self, other):
        return self._graph.node("LessOrEqual", self, other)

    def reshape(self, shape):
        """The same values in another shape, of which the first length is that of the samples."""
        if tuple(shape[1:]) == self.shape[1:]:
            return self
        return self._graph.node("Reshape", self, np.array(shape, dtype=np.int64), shape=(-1, *map(int, shape[1:])))


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


class _Graph:
    """A graph that grows, with the functions that `predict` takes of NumPy or torch."""

    def __init__(self, dtype: type[np.floating]):
        self._type = dtype
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[bytes | str, onnx.TensorProto] = {}
        self._made: dict[tuple, _Symbol] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def constant_array(self, array: np.ndarray) -> np.ndarray:
        """An array in the precision of the graph."""
        return array.astype(self._type)

    def input(self, name: str, shape: Sequence[int]) -> _Symbol:
        """A value from outside."""
        self._inputs.append(helper.make_tensor_value_info(name, self._element, ["samples", *shape]))
        return _Symbol(self, name, (-1, *shape))

    def symbol(self, value: _Symbol | np.ndarray | float) -> _Symbol:
        """A value as a symbol: itself, or a constant."""
        return value if isinstance(value, _Symbol) else _Symbol(self, self._name_of(value), np.shape(value))

    def _name_of(self, value: Any) -> str:
        if isinstance(value, _Symbol):
            return value.name
        array = np.ascontiguousarray(value if getattr(value, "dtype", None) == np.int64 else np.asarray(value, self._type))
        array = array.reshape(np.shape(value))
        key = f"{array.dtype} {array.shape} ".encode() + array.tobytes()
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return self._constants[key].name

    def node(self, kind: str, *values: Any, shape: tuple[int, ...] | None = None, **attributes: Any) -> _Symbol:
        """What an operation makes of values; the same operation on the same values is made once."""
        names = tuple(map(self._name_of, values))
        key = (kind, names, repr(sorted(attributes.items())))
        if key not in self._made:
            if shape is None:
                shape = max((value.shape for value in values if isinstance(value, _Symbol)), key=len)
            name = f"value_{len(self._made)}"
            self._nodes.append(helper.make_node(kind, names, [name], **attributes))
            self._made[key] = _Symbol(self, name, shape)
        return self._made[key]

    def model(self, outputs: Mapping[str, _Symbol]) -> onnx.ModelProto:
        """The model with these outputs, checked by ONNX."""
        infos = []
        for name, value in outputs.items():
            self._nodes.append(helper.make_node("Identity", [value.name], [name]))
            infos.append(helper.make_tensor_value_info(name, self._element, ["samples", *value.shape[1:]]))
        graph = helper.make_graph(self._nodes, "fem_resnet", self._inputs, infos, list(self._constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="fem_resnet")
        model.ir_version = _IR
        onnx.checker.check_model(model, full_check=True)
        return model

    # -- the functions of NumPy that `predict` asks for ----------------------------------------------------------------

    def exp(self, s):
        return self.node("Exp", s)

    def log(self, s):
        return self.node("Log", s)

    def tanh(self, s):
        return self.node("Tanh", s)

    def sin(self, s):
        return self.node("Sin", s)

    def cos(self, s):
        return self.node("Cos", s) if self._type == np.float32 else self.sin(s + math.pi / 2)

    def sqrt(self, s):
        return self.node("Sqrt", s)

    def abs(self, s):
        return self.node("Abs", s)

    def sign(self, s):
        return self.node("Sign", s)

    def tan(self, s):
        return self.sin(s) / self.cos(s)

    def sinh(self, s):
        return (self.exp(s) - self.exp(s * -1.0)) * 0.5

    def cosh(self, s):
        return (self.exp(s) + self.exp(s * -1.0)) * 0.5

    def arcsinh(self, s):
        size = self.abs(s)
        return self.sign(s) * self.log(size + self.sqrt(size * size + 1.0))

    def arctan(self, s):
        """Of an angle below pi/4 by halving it three times, arctan x = 2 arctan(x / (1 + sqrt(1 + x^2))); beyond by 1/x."""
        size = self.abs(s)
        inverted = self.node("Greater", size, 1.0)
        x = self.where(inverted, self.node("Reciprocal", self.clip(size, 1.0, math.inf)), size)
        for _ in range(3):
            x = x / (self.sqrt(x * x + 1.0) + 1.0)
        square, series = x * x, -1 / 19
        for k in reversed(range(9)):  # x < tan(pi/32): the next term is 1e-21
            series = square * series + (-1.0) ** k / (2 * k + 1)
        angle = x * series * 8.0
        return self.sign(s) * self.where(inverted, math.pi / 2 - angle, angle)

    def erf(self, s):
        if self._type == np.float64:
            raise ValueError(
                "net: expected an activation without erf in double precision, of which ONNX Runtime has only that of single "
                "precision, got one; give precision='single', or export to .npz"
            )
        return self.node("Erf", s)

    def where(self, condition, value, other):
        return self.node("Where", condition, value, other, shape=condition.shape)

    def clip(self, s, least, most):
        for kind, end in (("Max", least), ("Min", most)):
            s = s if math.isinf(end) else self.node(kind, s, end)
        return s

    def amax(self, s, axis, keepdims):
        return self.node("ReduceMax", s, shape=(*s.shape[:-1], 1), axes=[axis], keepdims=int(keepdims))
