"""Paired differences between two setups, with a 95 % interval and the smallest difference that is detectable.

Each seed has its own data, questions included. So the means of the seeds are independent, and their spread contains
the noise of the questions. A bootstrap over seeds and questions would count that noise twice, and its intervals would
be too wide; those of Student's t have the right coverage (tests/test_experiments.py).
"""

import math
from dataclasses import dataclass

import numpy as np

# The 97.5 % quantile of Student's t by the number of seeds; with one seed, of the normal distribution.
QUANTILE = {1: 1.96, 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
# A true difference of so many standard errors has an interval above 0 in 80 % of the experiments (noncentral t).
DETECTABLE = {1: 2.80, 2: 16.34, 3: 5.65, 4: 4.25, 5: 3.77, 6: 3.51, 7: 3.37, 8: 3.26, 9: 3.21, 10: 3.15}


@dataclass
class Difference:
    mean: float
    low: float  # 95 % interval
    high: float
    detectable: float
    per_seed: list[float]


def paired_difference(first: list[list[float]], second: list[list[float]]) -> Difference:
    """First minus second. Each has, per seed, a number per question; seeds and questions correspond.

    The standard error is that of the mean over the seeds. With one seed it is that of the mean over its questions, and
    says nothing about other seeds.
    """
    differences = [np.subtract(a, b) for a, b in zip(first, second, strict=True)]
    per_seed = [float(d.mean()) for d in differences]
    n = len(per_seed)
    values = per_seed if n > 1 else differences[0]
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    key = min(n, max(QUANTILE))
    half, detectable = QUANTILE[key] * error, DETECTABLE[key] * error
    mean = sum(per_seed) / n
    return Difference(mean, mean - half, mean + half, detectable, per_seed)
