"""Pictures at points of the plane, so that no order of pixels can be wrong.

A picture is an array of pixels whose row 0 is on top, as files have it and matplotlib's `imshow` shows it. Its extent
(left, right, bottom, top) says where its edges are, as that of `imshow` does. So pixel (i, j) of m x n is a rectangle around

    x = left + (j + 1/2) (right - left) / n,        y = top - (i + 1/2) (top - bottom) / m.

The value at a point is linear in x and in y between the centres of pixels; or it is the mean over a square around the point.
Such a mean is exact for pixels that are constant: the integral of the picture over [left, x] x [y, top] is linear in x and in
y on each pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates

from fem_resnet.arguments import choice, integer, number, real_array

__all__ = ["Extent", "METHODS", "as_pictures", "pictures_at", "pixel_centres"]

METHODS = ("linear", "mean")

#: How far beyond an edge a point is on it, in parts of the side.
_ON_THE_EDGE = 1e-9


class Extent:
    """Where the edges of a picture are.

    Parameters
    ----------
    given
        (left, right, bottom, top), from outside.

    Raises
    ------
    TypeError, ValueError
        If these are no four finite numbers, left < right and bottom < top.
    """

    def __init__(self, given: Any):
        self.left, self.right, self.bottom, self.top = edges = real_array("extent", given, (4,)).tolist()
        if not (self.left < self.right and self.bottom < self.top):
            raise ValueError(f"extent: expected (left, right, bottom, top), left < right and bottom < top, got {edges}")
        self.sides = np.array([self.right - self.left, self.top - self.bottom])

    def in_pixels(self, x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Row and column of points, shape (2, points): from 0 at the top to m at the bottom, from 0 at the left to n.

        Parameters
        ----------
        x
            The points, shape (points, 2).
        shape
            m and n.
        """
        row, column = (self.top - x[:, 1]) / self.sides[1], (x[:, 0] - self.left) / self.sides[0]
        return np.array([row * shape[0], column * shape[1]])


def pixel_centres(extent: Extent, shape: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """Where the centres of pixels are, one row after the other, shape (rows * columns, 2); and rows and columns.

    Parameters
    ----------
    extent
        The edges of the picture.
    shape
        (rows, columns), from outside.

    Raises
    ------
    TypeError, ValueError
        If these are no two positive integers.
    """
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shape: expected (rows, columns), got {shape!r}")
    m, n = (integer("shape", size) for size in shape)
    y = extent.top - (np.arange(m) + 0.5) / m * extent.sides[1]
    x = extent.left + (np.arange(n) + 0.5) / n * extent.sides[0]
    return np.column_stack([np.tile(x, m), np.repeat(y, n)]), (m, n)


def as_pictures(pixels: Any, channels: int | None) -> np.ndarray:
    """Pictures from outside, shape (samples, rows, columns, C).

    Parameters
    ----------
    pixels
        Shape (rows, columns), or (samples, rows, columns); with channels one more length, C.
    channels
        C; None for a label domain without channels.

    Raises
    ------
    TypeError, ValueError
        If they are no finite real numbers of such a shape.
    """
    array = real_array("pixels", pixels)
    last = () if channels is None else (channels,)
    if array.ndim == 2 + len(last):
        array = array[None]
    fits = array.ndim == 3 + len(last) and array.size > 0 and array.shape[3:] == last
    if not fits:
        C = "".join(f", {length}" for length in last)
        raise ValueError(f"pixels: expected shape (samples, rows, columns{C}), or (rows, columns{C}), got {np.shape(pixels)}")
    return array.reshape(*array.shape[:3], channels or 1)


def pictures_at(
    places: np.ndarray,
    pictures: np.ndarray,
    extent: Extent,
    method: str,
    outside: float | None,
    areas: np.ndarray,
) -> np.ndarray:
    """The values of pictures at points, shape (C, points, samples).

    Parameters
    ----------
    places
        The points, shape (points, 2), or (samples, points, 2).
    pictures
        Shape (samples, rows, columns, C).
    extent
        The edges of each picture.
    method
        "linear" or "mean", from outside.
    outside
        The value of all pixels around the picture; None if there are none, and the outermost go on to its edge.
    areas
        Of the square around each point whose mean is taken, shape (points,).

    Raises
    ------
    ValueError
        If `method` is another, or a point is outside of the extent and there is nothing.
    """
    choice("method", method, METHODS)
    outside = None if outside is None else number("outside", outside)
    samples, m, n, C = pictures.shape
    places = np.broadcast_to(places, (samples, *places.shape[-2:]))
    if outside is None:
        _refuse_outside(places, extent)
    values = np.empty((C, places.shape[1], samples))
    for s in range(samples):
        for c in range(C):
            if method == "mean":
                values[c, :, s] = _means(places[s], pictures[s, :, :, c], extent, outside, areas)
            else:
                at = extent.in_pixels(places[s], (m, n)) - 0.5
                mode, beyond = ("nearest", 0.0) if outside is None else ("grid-constant", outside)
                values[c, :, s] = map_coordinates(pictures[s, :, :, c], at, order=1, mode=mode, cval=beyond)
    return values


def _refuse_outside(places: np.ndarray, extent: Extent) -> None:
    slack = _ON_THE_EDGE * extent.sides
    low, high = np.array([extent.left, extent.bottom]) - slack, np.array([extent.right, extent.top]) + slack
    beyond = ((places < low) | (places > high)).any(axis=2)
    if beyond.any():
        sample, point = np.argwhere(beyond)[0]
        raise ValueError(
            f"extent: expected a picture that covers all nodes, got {np.count_nonzero(beyond)} of {beyond.size} places beyond "
            f"it, such as {places[sample, point].tolist()}; outside=0.0 gives the value there"
        )


def _means(x: np.ndarray, picture: np.ndarray, extent: Extent, outside: float | None, areas: np.ndarray) -> np.ndarray:
    """Means over squares around points, shape (points,)."""
    integral = np.pad((picture - (outside or 0.0)).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    half = np.sqrt(areas)[:, None] / 2
    # Rows and columns of the upper left and of the lower right corner.
    ends = [extent.in_pixels(x + sign * half * [-1, 1], picture.shape) for sign in (1, -1)]
    # The square without what lies beyond the picture, where all is 0.
    (top, left), (bottom, right) = (np.clip(end, 0.0, np.array(picture.shape)[:, None]) for end in ends)
    total = sum(
        sign * map_coordinates(integral, [row, column], order=1, mode="nearest")
        for row, column, sign in ((bottom, right, 1), (top, right, -1), (bottom, left, -1), (top, left, 1))
    )
    if outside is None:
        return total / ((bottom - top) * (right - left))
    return outside + total / np.prod(ends[1] - ends[0], axis=0)
