"""Predict with a network that `fem_resnet.export` has written. This file, the arrays and NumPy are all it takes:

    import numpy, predict
    net = dict(numpy.load("network.npz"))
    predict.predict(net, inputs)              # one row a sample, with the values at the nodes

Nodes are in the order of ``net["coordinates"]``, one channel (or field of a lift) after the other. ``xp`` is NumPy or torch.
"""  # noqa: D400, D415

import json
import math

import numpy as np

__all__ = ["FORMAT", "output", "predict"]

FORMAT = 1  # of the arrays


def predict(net, u, xp=np):
    """The prediction h(O) of each sample, shape (samples, nodes of the output), from inputs of shape (samples, nodes)."""
    O, kind = output(net, u, xp), str(net.get("prediction", "identity"))
    if kind == "logistic":
        return 0.5 * (1 + xp.tanh(0.5 * O))
    e = xp.exp(O - xp.amax(O, axis=-1, keepdims=True)) if kind == "softmax" else O
    return e / (e @ net["output_weights"][:, None]) if kind == "softmax" else O


def output(net, u, xp=np):
    """The output O of each sample before h, for classes their scores; the final state of a network without a head."""
    f, weights, t, steps = u, net["weights"], net["times"], int(net["steps"])
    if "V" in net:  # the lift
        f = (net["V"] @ u.reshape((-1, net["V"].shape[1], len(net["coordinates"])))).reshape((-1, len(weights)))
    for step in range((len(t) - 1) * steps):  # of the explicit Runge-Kutta method with A_ij, b_i
        h, k = (t[step // steps + 1] - t[step // steps]) / steps, []
        for i, row in enumerate(net["A"]):
            k.append(_slope(net, step, i, f + sum(h * float(A) * k[j] for j, A in enumerate(row[:i]) if A), xp))
        f = f + sum(h * float(b) * k[i] for i, b in enumerate(net["b"]) if b)
    if "W" in net:
        g = _project(net["basis_" + str(net["head_psi"])], weights * f) @ net["W"].T + net["mu"]
        f = _expand(net["basis_" + str(net["head_onto"])], g)
    return f


def _slope(net, step, i, f, xp):
    """f_t = sigma(a - B f), or B^T sigma(a - B f), in stage i of a step."""
    (beta, (phi, psi)), (a, (basis,)) = (_in_time(net, name, step, i) for name in ("beta", "a"))
    phi, psi = net[f"basis_{phi}"], net[f"basis_{psi}"]
    a = a if basis < 0 else _expand(net[f"basis_{basis}"], a[None, :])
    sigma = _sigma(net, a - _expand(phi, _project(psi, net["weights"] * f) @ beta.T), xp)
    return _expand(psi, _project(phi, net["weights"] * sigma) @ beta) if net["gradient_flow"] else sigma


def _in_time(net, name, step, i):
    """The coefficients of kernel or bias at the time of a stage, and the numbers of their bases."""
    at = net[f"{name}_in_time"][step, i]
    return sum(float(at[k]) * net[f"{name}_{k}"] for k in np.flatnonzero(at)), net[f"{name}_bases"][np.flatnonzero(at)[0]]


def _project(P, f):  # P^T f, in each channel where P is of one
    return (f.reshape((-1, f.shape[1] // len(P), len(P))) @ P).reshape((-1, f.shape[1] // len(P) * P.shape[1]))


def _expand(P, c):
    return (c.reshape((-1, c.shape[1] // P.shape[1], P.shape[1])) @ P.T).reshape((-1, c.shape[1] // P.shape[1] * len(P)))


def _sigma(net, s, xp):
    """The activation: formulas from left to right, each up to and including its cut."""
    formulas, cuts = json.loads(str(net["sigma"]))
    ends = [-math.inf, *cuts, math.inf]
    value = _value(formulas[-1], xp.clip(s, ends[-2], math.inf), xp)
    for left, right, formula in reversed(list(zip(ends, cuts, formulas))):
        value = xp.where(s <= right, _value(formula, xp.clip(s, left, right), xp), value)
    return value


_NAMES = {"atan": "arctan", "asinh": "arcsinh", **{f: f for f in ("exp", "log", "sin", "cos", "tan", "sinh", "cosh", "tanh")}}


def _value(formula, s, xp):
    """A formula in s: "s", a number, or a list of a function and its arguments."""
    if not isinstance(formula, list):
        return s if formula == "s" else formula
    name, values = formula[0], [_value(each, s, xp) for each in formula[1:]]
    if name == "Pow":
        return values[0] ** values[1]
    if name == "erf":
        return xp.erf(*values) if hasattr(xp, "erf") else np.vectorize(math.erf)(*values)
    return {"Add": sum, "Mul": math.prod}[name](values) if name in ("Add", "Mul") else getattr(xp, _NAMES[name])(*values)
