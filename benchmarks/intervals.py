"""The interval of a mean, as the tables of these benchmarks give it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# 97.5 % quantiles of Student's t at 1, 2, ... degrees of freedom; past them `_quantile` expands in 1 / freedom.
_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_NORMAL = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, mean ± half; `half` is infinite for a single value."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def format(self, digits: int, sign: str = "") -> str:
        half = "?" if math.isinf(self.half) else f"{self.half:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f} ± {half}"


def interval(values: Sequence[float]) -> Interval:
    """Student's: mean ± t · s / √n, with t the 97.5 % quantile at n − 1 degrees of freedom.

    Of the differences of pairs it is that of the paired t-test.
    """
    if len(values) < 2:
        return Interval(fmean(values), math.inf)
    return Interval(fmean(values), _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def _quantile(freedom: int) -> float:
    """The Cornish-Fisher expansion is within 10⁻⁴ of the quantile from 11 degrees of freedom on."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
