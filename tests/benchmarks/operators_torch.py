"""Maps of functions in PyTorch: FNO on grids of one and two dimensions, DeepONet on nodes that lie anywhere.

A convolutional network and FNO also read classes of functions on a circle.

    python operators_torch.py FOLDER SETTINGS

Runs in the environment of the peers, by `operators.py`. FOLDER/data.npz holds

- `inputs`, `targets` and `test_inputs`: (samples, points), or (samples, points, points) on a grid of two dimensions; classes
  are `targets` of shape (samples,), numbers from 0;
- `nodes`: (points, dimension), for DeepONet;
- `weights`, shaped as a sample: those of the norm in L2, where they are not all the same;
- `places`, shaped as a sample with one axis more: what FNO is told of each point, if not its numbers on the grid;
- `moves` and `signs`: (moves, points) and (moves,). Inputs and targets `signs[k] * values[moves[k]]` are samples too, where a
  grid is flat; a run that is `moved` takes one of these at random for each batch.

SETTINGS is a list in JSON: keywords of `Settings`, and those of the model. FOLDER/found<k>.npy gets what the k-th run puts out
for the test inputs, and a line of JSON is printed.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu

torch.set_num_threads(1)
torch.set_flush_denormal(True)


class SpectralConvolution(nn.Module):
    """A complex matrix between channels for each mode that is kept: |k| < modes in each direction."""

    def __init__(self, width: int, modes: int, dimension: int):
        super().__init__()
        others = [torch.arange(1 - modes, modes)] * (dimension - 1)
        self.kept = (slice(None), *torch.meshgrid(*others, torch.arange(modes), indexing="ij"))
        number = (2 * modes - 1) ** (dimension - 1) * modes
        # Li et al. (2021): uniform on [0, 1) over width^2. As real numbers, so that each of them counts.
        self.weights = nn.Parameter(torch.rand(2, number, width, width) / width**2)

    def forward(self, f):
        axes = tuple(range(1, f.ndim - 1))
        modes = torch.fft.rfftn(f, dim=axes)
        # (number of modes, batch, real and imaginary parts of all channels): a product of reals takes a third of the time.
        kept = torch.view_as_real(modes[self.kept]).flatten(1, -3).movedim(1, 0).movedim(-1, -2).flatten(2)
        real, imaginary = self.weights
        matrix = torch.cat([torch.cat([real, imaginary], dim=2), torch.cat([-imaginary, real], dim=2)], dim=1)
        product = (kept @ matrix).unflatten(2, (2, -1)).movedim(2, -1).movedim(0, 1)
        found = torch.zeros_like(modes)
        found[self.kept] = torch.view_as_complex(product.contiguous()).view(len(f), *self.kept[1].shape, -1)
        return torch.fft.irfftn(found, s=f.shape[1:-1], dim=axes)


class FNO(nn.Module):
    """Li et al. (2021) on a torus: no padding; with `coordinates` it is told the places of the points too.

    Without them it commutes with translations of the grid. Channels come last. Scores of classes are means over the grid.
    """

    def __init__(self, data, width=10, modes=16, layers=4, projection=32, coordinates=False):
        super().__init__()
        self.scale = data.inputs.std(), data.targets.std()
        grid = data.inputs.shape[1:]
        numbers = torch.stack(torch.meshgrid(*(torch.arange(n) / n for n in grid), indexing="ij"), dim=-1)
        places = numbers if data.places is None else data.places
        self.places = places if coordinates else places[..., :0]
        self.lift = nn.Linear(1 + self.places.shape[-1], width)
        self.spectral = nn.ModuleList(SpectralConvolution(width, modes, len(grid)) for _ in range(layers))
        self.pointwise = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.project = nn.Sequential(nn.Linear(width, projection), nn.GELU(), nn.Linear(projection, data.classes or 1))
        self.reads_classes = bool(data.classes)

    def forward(self, u):
        f = self.lift(torch.cat([u[..., None] / self.scale[0], self.places.expand(len(u), *self.places.shape)], dim=-1))
        for layer, (spectral, pointwise) in enumerate(zip(self.spectral, self.pointwise)):
            f = spectral(f) + pointwise(f)
            f = gelu(f) if layer < len(self.spectral) - 1 else f
        f = self.project(f)
        return f.flatten(1, -2).mean(dim=1) if self.reads_classes else self.scale[1] * f[..., 0]


def perceptron(*widths):
    """Tanh between linear maps that start by Glorot's rule."""
    layers = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class DeepONet(nn.Module):
    """Lu et al. (2022): the branch sees nodal values, the trunk the place.

    Outputs are scaled by mean and deviation at each node. With a `period` the trunk sees cosines and sines of each coordinate,
    of up to `waves` periods, and else the coordinates. The branch sees every `every`-th node.
    """

    def __init__(self, data, branch=(40, 40), trunk=(40,), terms=40, period=None, waves=2, every=1):
        super().__init__()
        self.every = every
        self.scale = data.inputs.std(), data.targets.std(dim=0), data.targets.mean(dim=0)
        places = data.nodes
        if period:
            angles = [2 * np.pi / period * k * places for k in range(1, waves + 1)]
            places = torch.cat([g(angle) for angle in angles for g in (torch.cos, torch.sin)], dim=1)
        self.places = places
        self.branch = perceptron(len(range(0, data.inputs.shape[1], every)), *branch, terms)
        self.trunk = nn.Sequential(perceptron(places.shape[1], *trunk, terms), nn.Tanh())
        self.constant = nn.Parameter(torch.zeros(1))

    def forward(self, u):
        found = self.branch(u[:, :: self.every] / self.scale[0]) @ self.trunk(self.places).T + self.constant
        return self.scale[1] * found + self.scale[2]


class Convolutions(nn.Sequential):
    """The fully convolutional network of Wang et al. (2017) on a circle: means over the circle are read at the end."""

    def __init__(self, data, widths=(128, 256, 128), sizes=(8, 5, 3)):
        layers, before = [nn.Unflatten(1, (1, -1))], 1
        for width, size in zip(widths, sizes):
            convolution = nn.Conv1d(before, width, size, padding="same", padding_mode="circular")
            layers, before = [*layers, convolution, nn.BatchNorm1d(width), nn.ReLU()], width
        super().__init__(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(before, data.classes))


MODELS = {"FNO": FNO, "DeepONet": DeepONet, "convolutions": Convolutions}


class Data:
    """Arrays of the file, in single precision."""

    def __init__(self, path: Path):
        with np.load(path) as arrays:
            found = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
        self.inputs, self.targets, self.test_inputs = (found[name] for name in ("inputs", "targets", "test_inputs"))
        self.nodes, self.signs, self.places = (found.get(name) for name in ("nodes", "signs", "places"))
        self.moves = found["moves"].long() if "moves" in found else None
        self.classes = int(self.targets.max()) + 1 if self.targets.ndim == 1 else 0
        self.weights = found.get("weights", torch.ones(self.targets.shape[1:]))

    def moved(self, values, move):
        """Samples by the `move`-th symmetry."""
        return self.signs[move] * values.flatten(1)[:, self.moves[move]].view_as(values)


@dataclass(frozen=True)
class Settings:
    """Adam with a cosine schedule, on batches; keywords of the model in `of_model`."""

    model: str
    epochs: int
    seed: int = 0
    rate: float = 1e-3
    batch: int = 20
    moved: bool = False
    of_model: dict = field(default_factory=dict)


def relative_errors(found, targets, weights):
    """In L2, of each sample."""
    axes = tuple(range(1, targets.ndim))
    return ((weights * (found - targets) ** 2).sum(axes) / (weights * targets**2).sum(axes)).sqrt()


def losses(data: Data, found, targets):
    """What is minimised: of each sample the relative error in L2, or the cross entropy of its class."""
    if data.classes:
        return cross_entropy(found, targets.long(), reduction="none")
    return relative_errors(found, targets, data.weights)


def train(data: Data, settings: Settings):
    """The trained model."""
    torch.manual_seed(settings.seed)
    model = MODELS[settings.model](data, **settings.of_model)
    samples = len(data.inputs)
    steps = settings.epochs * -(-samples // settings.batch)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(settings.epochs):
        for batch in torch.randperm(samples).split(settings.batch):
            inputs, targets = data.inputs[batch], data.targets[batch]
            if settings.moved:
                move = torch.randint(len(data.moves), ())
                inputs, targets = (data.moved(values, move) for values in (inputs, targets))
            optimiser.zero_grad()
            losses(data, model(inputs), targets).mean().backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def main(folder: Path, runs: list[dict]) -> None:
    data = Data(folder / "data.npz")
    for number, settings in enumerate(runs):
        start = time.process_time()
        model = train(data, Settings(**settings))
        seconds = time.process_time() - start
        with torch.no_grad():
            np.save(folder / f"found{number}.npy", model(data.test_inputs).numpy())
            training = losses(data, model(data.inputs), data.targets).mean()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(json.dumps({"parameters": parameters, "seconds": seconds, "training": float(training)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
