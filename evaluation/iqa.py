"""Image quality: how well a model's scores agree with people's mean opinion scores (MOS).

    test.json of Q-Align or DeQA-Score --read_iqa--> images, MOS --score_cases--> scores --correlations--> SRCC, PLCC

SRCC is the correlation of ranks, PLCC that of values. Q-Align reports them for the scores as they are, DeQA-Score
after a logistic function of four parameters was fitted to them.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.sources import read_rows
from evaluation.benchmarks import check_image, in_row
from inference.quality import Scorer, scores_of


@dataclass
class IqaCase:
    image: str
    mos: float


def read_iqa(path: Path, image_root: Path) -> list[IqaCase]:
    """Reads images and their MOS: "gt_score", or else what follows "->" in the "id". Raises ValueError for a bad row.

    The image is "image", or "img_path" in some files.
    """
    cases = []
    for i, row in enumerate(read_rows(path)):
        with in_row(path, i):
            if not isinstance(row, dict):
                raise ValueError("it should be a JSON object")
            image = row.get("image") or row.get("img_path")
            mos = row["gt_score"] if row.get("gt_score") is not None else str(row.get("id", "")).rpartition("->")[2]
            try:
                mos = float(mos)
            except (TypeError, ValueError):
                mos = math.nan
            if not isinstance(image, str) or not math.isfinite(mos):
                raise ValueError("it should have an image and a number gt_score")
            check_image(image_root, image, f"{path}, row {i}")
            cases.append(IqaCase(image, mos))
    if len(cases) < 5 or len({case.mos for case in cases}) < 2:
        raise ValueError(f"{path} needs at least five images, and two different scores")
    return cases


def score_cases(scorer: Scorer, cases: list[IqaCase], image_root: Path, batch_size: int) -> list[float]:
    """Returns the model's scores, from 0 to 1."""
    scores = []
    with tqdm(total=len(cases), unit="image", disable=None) as bar:
        for start in range(0, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            probabilities = scorer.probabilities([scorer.read(image_root / case.image) for case in batch])
            scores += scores_of(probabilities, "0-1").tolist()
            bar.update(len(batch))
    return scores


def plcc(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; NaN if all x or all y are equal."""
    x, y = (np.asarray(values, dtype=np.float64) - np.mean(values) for values in (x, y))
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / norm if norm > 0 else math.nan


def srcc(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation: that of the ranks, where equal values share their mean rank."""
    return plcc(mean_ranks(x), mean_ranks(y))


def mean_ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # rank of the last of each group of equal values
    return (last - (counts - 1) / 2)[inverse]


def fit_logistic(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Returns the values at x of (a - b) / (1 + exp(-(x - c) / d)) + b, fitted to y by least squares.

    NaN if the fit does not converge. Raises ModuleNotFoundError without scipy.
    """
    from scipy.optimize import OptimizeWarning, curve_fit
    from scipy.special import expit

    def logistic(x: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
        return (a - b) * expit((x - c) / d) + b

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    start = (y.max(), y.min(), x.mean(), max(x.std() / 4, 1e-12))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # few images: the covariance, not used here, is undefined
            parameters, _ = curve_fit(logistic, x, y, p0=start, maxfev=100_000)
    except RuntimeError:  # not converged
        return np.full_like(x, math.nan)
    return logistic(x, *parameters)


def correlations(scores: Sequence[float], mos: Sequence[float]) -> dict[str, float]:
    """Returns SRCC and PLCC, and with scipy those after the logistic fit."""
    numbers = {"SRCC": srcc(scores, mos), "PLCC": plcc(scores, mos)}
    try:
        fitted = fit_logistic(scores, mos)
    except ModuleNotFoundError:
        return numbers
    return numbers | {"SRCC, logistic fit": srcc(fitted, mos), "PLCC, logistic fit": plcc(fitted, mos)}


def score_lines(cases: list[IqaCase], scores: list[float], prompt: str) -> str:
    """Returns a JSON line per image, with the fields of qa_file.answer_lines: the truth is the MOS."""
    rows = [
        {"question": prompt, "truth": case.mos, "images": [case.image], "answer": score}
        for case, score in zip(cases, scores)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
