"""Means over training seeds and their standard errors."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over training seeds.

    Attributes:
        mean: The mean.
        error: Its standard error; None of a single seed, which does not say.
    """

    mean: float
    error: float | None = None

    def above(self, level: float) -> "Estimate":
        """The excess over a level without error."""
        return Estimate(self.mean - level, self.error)

    def over(self, other: "Estimate") -> "Estimate | None":
        """The quotient, with its error to first order; None unless the other is positive.

        Seeds of the two are independent. A part without error counts as exact; both without have none.
        """
        if other.mean <= 0:
            return None
        quotient = self.mean / other.mean
        if self.error is None and other.error is None:
            return Estimate(quotient)
        return Estimate(quotient, math.hypot(self.error or 0, quotient * (other.error or 0)) / other.mean)

    def text(self, digits: int, factor: float = 1) -> str:
        """ "mean ± error", or the mean alone."""
        mean = f"{factor * self.mean:.{digits}f}"
        return mean if self.error is None else f"{mean} ± {factor * self.error:.{digits}f}"


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of one value of each training seed, and its standard error s / √n."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)


def interpolated(points: list[tuple[float, list[float]]], x: float) -> list[float] | None:
    """Values of each training seed between two of the given points (x, values), linear in log x; None outside of them.

    Points are of the same trainings, so that their errors are not independent: each training is followed by itself.
    """
    points = sorted(points, key=lambda point: point[0])
    for (x_1, first), (x_2, second) in zip(points, points[1:]):
        if x_1 <= x <= x_2 and x_1 < x_2:
            share = math.log(x / x_1) / math.log(x_2 / x_1)
            return [(1 - share) * a + share * b for a, b in zip(first, second)]
    return None
