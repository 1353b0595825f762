"""Mean, standard deviation, and Welch's t-test."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """Several measurements of one quantity."""

    count: int
    mean: float
    deviation: float  # the sample standard deviation, with n − 1 in the denominator; NaN for one measurement

    def __str__(self) -> str:
        """The mean ± the standard deviation, to two digits of the deviation."""
        if not self.deviation > 0:
            return f"{self.mean:.6g}" + " ± 0" * (self.deviation == 0)
        places = min(max(1 - math.floor(math.log10(self.deviation)), 0), 12)
        return f"{self.mean:.{places}f} ± {self.deviation:.{places}f}"


def summarize(values: Sequence[float]) -> Summary:
    """Count, mean and standard deviation, in float64."""
    numbers = np.asarray(values, np.float64)
    deviation = float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
    return Summary(len(numbers), float(numbers.mean()) if len(numbers) else math.nan, deviation)


class Welch(NamedTuple):
    """The result of Welch's t-test, which compares two means without assuming equal variances."""

    t: float
    freedom: float  # degrees of freedom (Welch and Satterthwaite)
    p: float  # two-sided: how often means so far apart come by chance from equal ones


def welch(a: Summary, b: Summary) -> Welch | None:
    """The test of two samples; None where it says nothing: fewer than two measurements, or none that differ."""
    if min(a.count, b.count) < 2:
        return None
    from scipy.special import stdtr  # SciPy comes with JAX

    variances = a.deviation**2 / a.count, b.deviation**2 / b.count
    if not (total := sum(variances)) > 0:
        return None
    t = (a.mean - b.mean) / math.sqrt(total)
    freedom = total**2 / (variances[0] ** 2 / (a.count - 1) + variances[1] ** 2 / (b.count - 1))
    return Welch(t, freedom, float(2 * stdtr(freedom, -abs(t))))
