"""The same network in JAX, with a scan over its layers, and in diffrax."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)


def slope(phi, weighted, f, a, beta):
    return jnp.tanh(a[:, None] - phi @ (beta @ (weighted.T @ f)))


def step(phi, weighted, h, f, layer):
    rate = partial(slope, phi, weighted, a=layer[0], beta=layer[1])
    k1 = rate(f)
    k2 = rate(f + h / 2 * k1)
    k3 = rate(f + h / 2 * k2)
    k4 = rate(f + h * k3)
    return f + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None


def loss(weights, f, targets):
    return 0.5 * jnp.sum(weights[:, None] * (f - targets) ** 2) / f.shape[1]


class Jax:
    """The network by jit and scan."""

    def __init__(self, data):
        self._arrays = {name: jnp.asarray(data.read(name)) for name in ("phi", "weights", "inputs", "targets")}
        self._arrays["weighted"] = self._arrays["weights"][:, None] * self._arrays["phi"]
        self._parameters = jnp.asarray(data.read("a")), jnp.asarray(data.read("beta"))

    def prepare(self) -> None:
        # Arrays are arguments, since the compiler would fold constants.
        self._compiled = jax.jit(jax.value_and_grad(self.value))

    def final(self, layers, arrays):
        advance = self.layer_of(partial(step, arrays["phi"], arrays["weighted"], 1 / len(layers[0])))
        return jax.lax.scan(advance, arrays["inputs"], layers)[0]

    def value(self, layers, arrays):
        return loss(arrays["weights"], self.final(layers, arrays), arrays["targets"])

    @staticmethod
    def layer_of(function):
        return function

    def scale(self, factor: float) -> None:
        self._parameters = jax.block_until_ready(tuple(factor * x for x in self._parameters))

    def evaluate(self) -> float:
        J, self._gradient = jax.block_until_ready(self._compiled(self._parameters, self._arrays))
        return float(J)

    def gradient(self):
        return np.arange(self._parameters[0].shape[1]), *map(np.asarray, self._gradient)


class JaxCheckpoint(Jax):
    """The same; the stages of a layer are computed again on the way back."""

    layer_of = staticmethod(jax.checkpoint)


class ClassicalRK4(diffrax.AbstractERK):
    """diffrax has no classical Runge-Kutta."""

    # At the end of the step the next layer begins. So the last stage stands a little before the end, by less than diffrax
    # checks. Time only serves to look up the layer.
    tableau = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0 - 1e-6]),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


class Diffrax(Jax):
    """One solve over all layers, with one step of length one for each; diffrax chooses the checkpoints."""

    def final(self, layers, arrays):
        a, beta = layers

        def rate(t, f, arguments):
            layer = jnp.floor(t).astype(int)
            return slope(arrays["phi"], arrays["weighted"], f, a[layer], beta[layer]) / len(a)

        return diffrax.diffeqsolve(
            diffrax.ODETerm(rate), ClassicalRK4(), 0.0, float(len(a)), 1.0, arrays["inputs"],
            stepsize_controller=diffrax.ConstantStepSize(), adjoint=diffrax.RecursiveCheckpointAdjoint(),
            max_steps=len(a),
        ).ys[-1]  # fmt: skip
