"""The value function by hj-reachability: `python peers_hj.py PROBLEM.npz FOUND.npz ..`, in the environment of the peers.

Each PROBLEM has the `weights` of the cells, the `bias` and `kernel` ranges of a box A, the `target`, T, and the `axes` of the
grid; sigma is tanh and L = 0. F(., 0) and dF/dv_i on the grid are written to FOUND. Differences are WENO of order 5, and
steps Runge-Kutta of order 3.
"""

import sys

import hj_reachability as hj
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)


class Cells(hj.Dynamics):
    """v_i' = tanh(u_i), where u_i is any number between the extremes of section 4.2 for a box, the same for all i."""

    def __init__(self, weights, bias, kernel):
        self.weights, self.bias, self.kernel = jnp.asarray(weights), bias, kernel
        box = hj.sets.Box(jnp.zeros(len(weights)), jnp.ones(len(weights)))
        super().__init__("min", "max", box, hj.sets.Box(jnp.zeros(1), jnp.zeros(1)))

    def extremes(self, state):
        positive, negative = self.weights @ jnp.maximum(state, 0), self.weights @ jnp.maximum(-state, 0)
        (a0, a1), (b0, b1) = self.bias, self.kernel
        return jnp.tanh(a0 - b1 * positive + b0 * negative), jnp.tanh(a1 - b0 * positive + b1 * negative)

    def __call__(self, state, control, disturbance, time):
        low, high = self.extremes(state)
        return low + control * (high - low)

    def optimal_control_and_disturbance(self, state, time, grad_value):
        return jnp.where(grad_value > 0, 0.0, 1.0), jnp.zeros(1)

    def partial_max_magnitudes(self, state, time, value, grad_value_box):
        low, high = self.extremes(state)
        return jnp.full(state.shape, jnp.maximum(jnp.abs(low), jnp.abs(high)))


def solve(problem: str, found: str) -> None:
    given = np.load(problem)
    weights, target, T = given["weights"], given["target"], float(given["T"])
    axes = [given[f"axis{i}"] for i in range(len(weights))]
    domain = hj.sets.Box(*(np.array([axis[end] for axis in axes]) for end in (0, -1)))
    grid = hj.Grid.from_lattice_parameters_and_boundary_conditions(
        domain, tuple(map(len, axes)), (hj.boundary_conditions.extrapolate,) * len(axes)
    )
    dynamics = Cells(weights, tuple(given["bias"].tolist()), tuple(given["kernel"].tolist()))
    terminal = jnp.sum(jnp.asarray(weights) * (grid.states - jnp.asarray(target)) ** 2, axis=-1) / 2
    settings = hj.SolverSettings.with_accuracy("very_high", hamiltonian_postprocessor=hj.solver.identity)
    values = hj.step(settings, dynamics, grid, 0.0, terminal, -T, progress_bar=False)
    np.savez(found, values=values, gradient=grid.grad_values(values, settings.upwind_scheme))


if __name__ == "__main__":
    for pair in zip(sys.argv[1::2], sys.argv[2::2]):
        solve(*pair)
