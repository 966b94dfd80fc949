"""Confidence intervals: Wilson's for shares, the bootstrap for means and paired differences, normal for perplexity."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # drawn numbers that are held at a time


class Interval(NamedTuple):
    """A value with the ends of its confidence interval, and the interval's name.

    It is "wilson", "bootstrap" or "stratified bootstrap".
    """

    value: float
    low: float
    high: float
    kind: str


def quantile(confidence: float) -> float:
    """How many standard deviations a two-sided normal interval of this confidence reaches to either side.

    Raises:
        ValueError: it does not lie between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"{confidence=} must lie between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def mean_score(
    scores: Sequence[float], contexts: Sequence[Hashable], confidence: float = 0.95, *, all_or_nothing: bool = True
) -> Interval:
    """The mean of scores from 0 to 1, with Wilson's interval where each is 0 or 1 and about a context of its own.

    Elsewhere the interval is the bootstrap's over contexts: scores about one context are drawn together. Where all are
    equal that one has no width, however few samples there are.

    Args:
        scores: at least one.
        contexts: what each score is about.
        confidence: of the interval.
        all_or_nothing: False = a score can lie between 0 and 1, even if none of these does.

    Raises:
        ValueError: no score, or a confidence outside (0, 1).

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209-212; Efron and Tibshirani, An
    Introduction to the Bootstrap (1993), chapter 13 (percentiles).
    """
    if not len(scores):
        raise ValueError("a mean needs at least one score")
    z, n = quantile(confidence), len(scores)
    mean = float(np.mean(scores))
    if all_or_nothing and set(scores) <= {0, 1} and len(set(contexts)) == n:
        centre, width = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return Interval(mean, max((centre - width) / scale, 0.0), min((centre + width) / scale, 1.0), "wilson")
    return _bootstrap(scores, contexts, confidence)


def paired_difference(
    scores: Sequence[float], others: Sequence[float], contexts: Sequence[Hashable], confidence: float = 0.95
) -> Interval:
    """The mean of scores less that of others on the same samples, with the paired bootstrap's interval.

    Where no sample differs the interval has no width, however few samples there are: look at their number.

    Args:
        scores, others: of the same samples, at least one.
        contexts: what each is about; those about one context are drawn together.
        confidence: of the interval.

    Raises:
        ValueError: no score, or a confidence outside (0, 1).

    Source: as `mean_score`.
    """
    quantile(confidence)
    if not len(scores) or len(scores) != len(others):
        raise ValueError(f"{len(scores)} and {len(others)} scores can't be compared pair by pair")
    return _bootstrap([a - b for a, b in zip(scores, others, strict=True)], contexts, confidence)


def mean_of_means(groups: Sequence[tuple[Sequence[float], Sequence[Hashable]]], confidence: float = 0.95) -> Interval:
    """The mean of the means of several groups, weighted alike, with the stratified bootstrap's interval.

    Contexts are drawn in every group by itself.

    Args:
        groups: values, at least one, and what each is about; scores of tasks, or differences.
        confidence: of the interval.

    Raises:
        ValueError: no group, one without values, or a confidence outside (0, 1).

    Source: as `mean_score`; Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.2.
    """
    quantile(confidence)
    if not groups or not all(len(values) for values, _ in groups):
        raise ValueError("a mean of means needs at least one group, and a value in each")
    rng = np.random.default_rng(0)
    means = np.mean([_drawn_means(*group, rng) for group in groups], axis=0)
    value = float(np.mean([np.mean(values) for values, _ in groups]))
    return Interval(value, *_ends(means, confidence), "stratified bootstrap")


def _bootstrap(values: Sequence[float], contexts: Sequence[Hashable], confidence: float) -> Interval:
    """The percentile interval of a mean, over contexts drawn with replacement; the same draws for the same counts."""
    means = _drawn_means(values, contexts, np.random.default_rng(0))
    return Interval(float(np.mean(values)), *_ends(means, confidence), "bootstrap")


def _drawn_means(values: Sequence[float], contexts: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
    """float64 [RESAMPLES], the means of as many contexts drawn with replacement."""
    place = {context: i for i, context in enumerate(dict.fromkeys(contexts))}
    sums, counts = np.zeros(len(place)), np.zeros(len(place))
    for value, context in zip(values, contexts, strict=True):
        sums[place[context]] += value
        counts[place[context]] += 1
    rows = max(_AT_ONCE // len(place), 1)
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(len(place), size=(min(rows, RESAMPLES - start), len(place)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def _ends(means: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
