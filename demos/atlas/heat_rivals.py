"""What others come to on the samples of heat.py: linear map and kernel ridge regression, FNO and DeepONet.

All know the symmetries of the gear that they can know. The kernel of kernel ridge is odd, and its samples are turned and
reflected to all 16 positions. DeepONet sees them at the nodes, where it takes one of the 32 symmetries at random for each
batch. FNO sees the temperature on a square grid, 0 outside of the gear, and the places of the grid's points. The grid allows 8
of the 16 positions at random, and samples that are turned by an eighth are new samples on it.
"""

import itertools
import time

import comparison
import firedrake as fd
import heat
import numpy as np
from comparison import in_pytorch, relative_errors
from scipy.spatial import cKDTree
from sklearn.metrics.pairwise import euclidean_distances

from fem_resnet import LabelSpace, Sensors, laplace_basis, read_mesh

#: Of each, the last TEST samples are test samples.
TEST = 200
GRID, HALF_WIDTH = 32, 1.05


def turn(points: np.ndarray) -> np.ndarray:
    """By an eighth."""
    c = np.sqrt(0.5)
    return points @ np.array([[c, c], [-c, c]])


def mirror(points: np.ndarray) -> np.ndarray:
    """At the first axis."""
    return points * [1, -1]


def positions(points: np.ndarray) -> np.ndarray:
    """Permutations of the nodes, shape (16, nodes): eight turns, and the mirrored ones. `values[:, permutation]` is moved."""
    tree = cKDTree(points)
    turned, mirrored = (tree.query(move(points))[1] for move in (turn, mirror))
    turns = [np.arange(len(points))]
    for _ in range(7):
        turns.append(turned[turns[-1]])
    return np.array([*turns, *(mirrored[one] for one in turns)])


# -- kernel ridge regression on samples in all positions -----------------------------------------------------------------


def odd_kernel(x: np.ndarray, z: np.ndarray, gamma: float) -> np.ndarray:
    """The odd part of a Gaussian kernel."""
    return np.exp(-gamma * euclidean_distances(x, z, squared=True)) - np.exp(-gamma * euclidean_distances(x, -z, squared=True))


class RidgeInAllPositions:
    """Kernel ridge regression with each sample in its 16 positions.

    The kernel between the t-th turn of x and the s-th of z depends on t - s. So a Fourier transform over the turns leaves a
    system for each of eight frequencies, in as many unknowns as there are samples and mirrored samples. Real values have the
    same in the frequencies k and -k.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, moves: np.ndarray, gamma: float, alpha: float):
        self.gamma = gamma
        x, y = (np.concatenate([values, values[:, moves[8]]]) for values in (x, y))
        self.turned = [x[:, move] for move in moves[:8]]
        kernel = np.fft.rfft([odd_kernel(one, x, gamma) for one in self.turned], axis=0)
        targets = np.fft.rfft([y[:, move] for move in moves[:8]], axis=0)
        solved = [np.linalg.solve(K + alpha * np.eye(len(x)), t) for K, t in zip(kernel, targets)]
        self.coefficients = np.fft.irfft(solved, 8, axis=0)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return sum(odd_kernel(x, one, self.gamma) @ c for one, c in zip(self.turned, self.coefficients))


def ridge_in_all_positions(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, moves: np.ndarray, most: int = 300):
    """Predictions and CPU seconds; width and regularisation are chosen on a fifth of the first samples, at most `most`."""
    start = time.process_time()
    size, scale = np.sqrt((x**2).sum(axis=1).mean()), y.std()
    u, v = x / size, y / scale
    few = min(len(u), most)
    held = few // 5

    def missed(gamma: float, alpha: float) -> float:
        ridge = RidgeInAllPositions(u[held:few], v[held:few], moves, gamma, alpha)
        return float(np.square(ridge.predict(u[:held]) - v[:held]).mean())

    grid = itertools.product(np.logspace(-2, 0.5, 6), np.logspace(-7, -1, 4))
    found = scale * RidgeInAllPositions(u, v, moves, *min(grid, key=lambda both: missed(*both))).predict(x_test / size)
    return found, time.process_time() - start


# -- neural operators ----------------------------------------------------------------------------------------------------


def grid_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values at the nodes, shape (samples, nodes), on the grid, (samples, GRID, GRID); 1 where its points are on Y, else 0."""
    mesh = read_mesh(heat.MESH, fd.COMM_SELF)
    Y = LabelSpace(fd.FunctionSpace(mesh, "CG", 1))
    x = HALF_WIDTH * ((2 * np.arange(GRID) + 1) / GRID - 1)
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2)
    inside = np.array([mesh.locate_cell(point, tolerance=1e-6) is not None for point in grid])
    found = np.zeros((len(values), len(grid)))
    found[:, inside] = Sensors(laplace_basis(Y, 1), grid[inside]).evaluate(Y.batch(values.T)).T
    return found.reshape(-1, GRID, GRID), inside.reshape(GRID, GRID).astype(float)


def on_the_grid(data: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """What FNO sees of the first `count` samples, as they are and turned by an eighth."""
    eighth = positions(data["points"])[1]
    inputs, targets = (np.concatenate([data[name][:count], data[name][:count, eighth]]) for name in ("inputs", "targets"))
    numbers = np.arange(GRID**2).reshape(GRID, GRID)
    moves = [np.rot90(one, k).ravel() for one in (numbers, numbers.T) for k in range(4)]
    u, weights = grid_values(inputs)
    return {
        "inputs": u,
        "targets": grid_values(targets)[0],
        "test_inputs": grid_values(data["inputs"][-TEST:])[0],
        "test_targets": grid_values(data["targets"][-TEST:])[0],
        "weights": weights,
        "moves": np.array(moves * 2),
        "signs": np.repeat([1.0, -1.0], len(moves)),
    }


def at_the_nodes(data: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """What DeepONet sees of the first `count` samples."""
    moves = positions(data["points"])
    return {
        "inputs": data["inputs"][:count],
        "targets": data["targets"][:count],
        "test_inputs": data["inputs"][-TEST:],
        "test_targets": data["targets"][-TEST:],
        "nodes": data["points"],
        "weights": data["weights"] / data["weights"].mean(),
        "moves": np.concatenate([moves, moves]),
        "signs": np.repeat([1.0, -1.0], len(moves)),
    }


def fno(epochs: int, rate: float, **of_model) -> dict:
    return {"model": "FNO", "rate": rate, "epochs": epochs, "moved": True, "of_model": {"coordinates": True} | of_model}


def deeponet(epochs: int, rate: float, **of_model) -> dict:
    return {"model": "DeepONet", "rate": rate, "epochs": epochs, "moved": True, "of_model": of_model}


#: What an operator sees, and its settings for 1,000 samples. They take about as many CPU seconds as the network.
OPERATORS = {
    "FNO": (on_the_grid, fno(14, 1e-2, width=6, modes=8, projection=32)),
    "small FNO": (on_the_grid, fno(14, 1e-2, width=3, modes=5, projection=32)),
    "DeepONet": (at_the_nodes, deeponet(120, 3e-3, branch=(40, 40), trunk=(40, 40), terms=40, every=2)),
    "small DeepONet": (at_the_nodes, deeponet(150, 5e-3, branch=(12,), trunk=(16,), terms=16, every=6)),
}


def operator(method: str, count: int, seed: int, short: bool, data: dict[str, np.ndarray]) -> dict:
    """Test and training error, seconds and parameters of an operator on the first `count` samples; two epochs in short.

    With fewer samples there are as many steps, but at most four times the epochs.
    """
    see, settings = OPERATORS[method]
    arrays = see(data, count)
    targets = arrays.pop("test_targets")
    more = min(4.0, (len(data["inputs"]) - TEST) / count)
    run = settings | {"seed": seed, "epochs": 2 if short else round(more * settings["epochs"])}
    (found,) = in_pytorch.trained(arrays, [run])
    error = relative_errors(found.pop("outputs"), targets, arrays["weights"]).mean()
    return found | {"error": float(error)}


def ridges(count: int, data: dict[str, np.ndarray]) -> dict:
    """Test error and seconds of a linear map, of kernel ridge regression, and of the latter in all positions."""
    root = np.sqrt(data["weights"])
    x, y, x_test = (root * values for values in (data["inputs"][:count], data["targets"][:count], data["inputs"][-TEST:]))
    found = [*comparison.ridges(x, y, x_test)]
    found.append(("kernel ridge, in all positions", *ridge_in_all_positions(x, y, x_test, positions(data["points"]))))
    targets = data["targets"][-TEST:]
    return {name: [float(relative_errors(y / root, targets, data["weights"]).mean()), s] for name, y, s in found}
