r"""Waves in a thin layer of fluid on a rotating sphere: from the vorticity at one time to that at a later one.

On the unit sphere, with longitude x, latitude y and the radial vorticity z of a flow without divergence,

    z_t + J(p, z + 2 OMEGA sin y) = VISCOSITY Laplace z,        Laplace p = z,        J(p, q) = (p_x q_y - p_y q_x) / cos y,

from z(., 0) to z(., TIME). The flow carries the absolute vorticity z + 2 OMEGA sin y with it, which makes Rossby waves.

z(., 0) is Gaussian, N(0, s^2 (-Laplace + 12)^-2) on the spherical harmonics of the degrees 1 .. 4 (24 numbers). s is such that
the root mean square of z(., 0) is SIZE in the mean. The law commutes with turns about the axis, and with z -> -z(x, -y).

The solution is spectral, with degrees up to DEGREE. It keeps waves of Rossby and Haurwitz to 4e-7, and is 3e-7 from one with
twice the degrees and steps (in L2, the largest of ten samples). 300 samples take six seconds.

Samples are values on a Gaussian grid: latitudes of Gauss and Legendre, equally spaced longitudes, with their weights.
"""

import numpy as np
from scipy.special import assoc_legendre_p_all, roots_legendre

OMEGA, VISCOSITY, TIME, SIZE = 3.0, 0.01, 1.0, 0.8
#: Degrees of the inputs and of the solution, steps of the solution, latitudes of the samples.
INPUT_DEGREE, DEGREE, STEPS, LATITUDES = 4, 21, 40, 16
#: So many samples at once.
BATCH = 50


class Harmonics:
    """Real functions by coefficients c_ml, m <= l <= degree: sum_l (P_0l c_0l + 2 Re sum_m P_ml(sin y) c_ml exp(i m x)).

    P_ml are the Legendre functions, of size 1 in L2(-1, 1). Coefficients have the shape (.., m, l, samples) and values
    (.., longitudes, latitudes, samples), with twice as many longitudes as latitudes.
    """

    def __init__(self, degree: int, latitudes: int):
        self.sines, weights = roots_legendre(latitudes)
        self.longitudes = np.arange(2 * latitudes) * np.pi / latitudes
        tables = assoc_legendre_p_all(degree, degree, self.sines, norm=True, diff_n=1)[:, :, : degree + 1]
        self._values, self._slopes = np.ascontiguousarray(tables.transpose(0, 2, 3, 1))  # (m, latitudes, l)
        self._moments = np.ascontiguousarray((weights[:, None] * self._values).swapaxes(1, 2))
        self.m, self.l = np.meshgrid(np.arange(degree + 1), np.arange(degree + 1), indexing="ij")
        #: Of an integral over the sphere, shape (longitudes, latitudes).
        self.weights = np.tile(weights * np.pi / latitudes, (2 * latitudes, 1))

    def _at_places(self, tables: np.ndarray, c: np.ndarray) -> np.ndarray:
        waves = (tables @ c.view(float)).view(complex)
        return np.fft.irfft(waves, len(self.longitudes), axis=-3, norm="forward")

    def values(self, c: np.ndarray) -> np.ndarray:
        """Of functions."""
        return self._at_places(self._values, c)

    def gradient(self, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives by the longitude, and by the sine of the latitude."""
        return self._at_places(self._values, 1j * self.m[..., None] * c), self._at_places(self._slopes, c)

    def coefficients(self, values: np.ndarray) -> np.ndarray:
        """The integrals of functions with the harmonics, exact where these are polynomials of a low degree."""
        waves = np.fft.rfft(values, axis=-3, norm="forward")[..., : len(self.m), :, :]
        return (self._moments @ np.ascontiguousarray(waves).view(float)).view(complex)


def inputs(samples: int, seed: int, degree: int = DEGREE) -> np.ndarray:
    """Coefficients of random z(., 0)."""
    random, n = np.random.default_rng(seed), INPUT_DEGREE + 1
    m, l = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    deviation = np.where((l > 0) & (m <= l), 1 / (l * (l + 1) + 12.0), 0.0)
    # A mean square of the values is (c_0l^2 + 2 sum_m |c_ml|^2) / 2, which has 2 l + 1 equal parts a degree.
    deviation *= SIZE * np.sqrt(2 / np.sum(np.where(m > 0, 2, 1) * deviation**2))
    real, imaginary = random.standard_normal((2, n, n, samples))
    c = np.zeros((degree + 1, degree + 1, samples), complex)
    c[:n, :n] = deviation[..., None] * np.where(m[..., None] > 0, (real + 1j * imaginary) / np.sqrt(2), real)
    return c


def solve(c: np.ndarray, directions: np.ndarray | None = None, *, steps: int = STEPS) -> np.ndarray:
    """z(., TIME) of z(., 0), and its derivatives in directions, as coefficients.

    The linear part of the equation is solved exactly, the rest by the method of Runge and Kutta of order 4 (Lawson's method).
    Products are free of aliasing. Derivatives are those of the scheme.

    Parameters
    ----------
    c
        Shape (m, l, samples).
    directions
        Shape (directions, m, l, samples); None for no derivatives.
    steps
        In place of STEPS.

    Returns
    -------
    numpy.ndarray
        Shape (1 + directions, m, l, samples), the solution first.
    """
    degree, dt = len(c) - 1, TIME / steps
    space = Harmonics(degree, 3 * (degree + 1) // 2)
    laplace = -(space.l * (space.l + 1.0))[..., None]
    inverse = np.divide(1, laplace, out=np.zeros_like(laplace), where=laplace != 0)
    half = np.exp(dt / 2 * (VISCOSITY * laplace - 2j * OMEGA * space.m[..., None] * inverse))

    def rate(z: np.ndarray) -> np.ndarray:
        """-J(p, z) of the solution, and its derivative -J(dp, z) - J(p, dz) in each direction."""
        z_x, z_s = space.gradient(z)
        p_x, p_s = space.gradient(inverse * z)
        found = p_s[:1] * z_x - p_x[:1] * z_s
        found[1:] += p_s[1:] * z_x[0] - p_x[1:] * z_s[0]
        return space.coefficients(found)

    z = c[None] if directions is None else np.concatenate([c[None], directions])
    for _ in range(steps):
        k1 = rate(z)
        k2 = rate(half * (z + dt / 2 * k1))
        k3 = rate(half * z + dt / 2 * k2)
        k4 = rate(half * (half * z + dt * k3))
        z = half * (half * (z + dt / 6 * k1) + dt / 3 * (k2 + k3)) + dt / 6 * k4
    return z


def places() -> dict[str, np.ndarray]:
    """The points of the samples in space, shape (points, 3), their weights, and the numbers of latitudes and longitudes."""
    space = Harmonics(0, LATITUDES)
    sines, x = np.meshgrid(space.sines, space.longitudes, indexing="ij")
    cosines = np.sqrt(1 - sines**2)
    points = np.stack([cosines * np.cos(x), cosines * np.sin(x), sines], axis=-1)
    return {"points": points.reshape(-1, 3), "weights": space.weights.T.ravel()}


def samples(number: int, seed: int, directions: int = 0) -> dict[str, np.ndarray]:
    """Pairs of z(., 0) and z(., TIME), and derivatives of the map between them in random directions of the same law.

    Parameters
    ----------
    number, seed
        How many, and of which random numbers.
    directions
        How many of each sample.

    Returns
    -------
    dict
        `inputs` and `targets`, shape (number, points); `points`, shape (points, 3), and `weights`, (points,). They lie on
        LATITUDES circles from south to north, one after the other, with 2 LATITUDES points each. With directions also
        `directions` and `derivatives`, shape (number, directions, points): the second ones are those of the targets.
    """
    to = Harmonics(DEGREE, LATITUDES)

    def at_points(z: np.ndarray) -> np.ndarray:  # (.., m, l, samples) to (samples, .., points)
        values = np.moveaxis(to.values(z).swapaxes(-3, -2), -1, 0)
        return values.reshape(*values.shape[:-2], -1)

    c, found = inputs(number, seed), {}
    d = inputs(number * directions, seed + 1_000_000).reshape(*c.shape, directions)
    d = np.ascontiguousarray(np.moveaxis(d, -1, 0))
    size = max(1, BATCH // (1 + directions))
    parts = [slice(first, first + size) for first in range(0, number, size)]
    solved = np.concatenate([at_points(solve(c[..., part], d[..., part])) for part in parts])
    found = {"inputs": at_points(c), "targets": solved[:, 0], **places()}
    return found | ({"directions": at_points(d), "derivatives": solved[:, 1:]} if directions else {})
