"""Intervals of proportions, so that a share of few rows is not read as one of many."""

from typing import NamedTuple

Z = 1.959963984540054  # 95 %


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def wilson(hits: float | int, n: float | int, z: float = Z) -> Interval:
    """Of a proportion hits / n (Wilson 1927); (0, 1) for n = 0, when nothing is known.

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    if n == 0:
        return Interval(0.0, 1.0)
    p, square = hits / n, z * z / n
    half = z * (p * (1 - p) / n + square / (4 * n)) ** 0.5
    return Interval(max(0.0, (p + square / 2 - half) / (1 + square)), min(1.0, (p + square / 2 + half) / (1 + square)))


def newcombe(hits: float | int, n: float | int, other_hits: float | int, other_n: float | int, z: float = Z) -> Interval:
    """Of a difference of two proportions, hits / n - other_hits / other_n (Newcombe 1998, method 10); (-1, 1) where one has no rows.

    Both Wilson intervals, put together in squares: difference - sqrt((p - low)^2 + (other_high - other_p)^2), and likewise above.
    """
    if n == 0 or other_n == 0:
        return Interval(-1.0, 1.0)
    p, q = hits / n, other_hits / other_n
    first, second = wilson(hits, n, z), wilson(other_hits, other_n, z)
    below = ((p - first.low) ** 2 + (second.high - q) ** 2) ** 0.5
    above = ((first.high - p) ** 2 + (q - second.low) ** 2) ** 0.5
    return Interval(max(-1.0, p - q - below), min(1.0, p - q + above))
