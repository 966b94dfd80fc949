"""Sizes at which a candidate costs a budget, for all heads of a layer at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minference_jax.patterns import HeadPattern, PatternArrays, VerticalSlash
from minference_jax.search.candidates import scale_range, scaled

_MOST_TRIALS = 24  # doublings and halvings: enough for one token in a million


class Equalised(NamedTuple):
    """A candidate at the budget.

    Attributes:
        sizes: int32 [N] for each head.
        cost: float64 [N], what they cost.
        is_within: bool [N]; False where even the least sizes cost more than the budget.
    """

    sizes: PatternArrays
    cost: np.ndarray
    is_within: np.ndarray


def equalise(
    candidate: HeadPattern,
    cost_of: Callable[[PatternArrays], np.ndarray],
    budget: np.ndarray,
    *,
    size: int,
    tolerance: float,
) -> Equalised:
    """Makes a candidate as large as a budget allows; what it costs is never above.

    It grows in its proportions. Tiles make the cost of slashes jump: what a jump leaves of the budget goes to the
    verticals. A cost that jumps elsewhere can stay further below the budget than the tolerance.

    Args:
        candidate: kind and proportions.
        cost_of: sizes int32 [N] -> cost float64 [N], which grows with the sizes.
        budget: float64 [N].
        size: most tokens of a prompt.
        tolerance: a head whose cost is no more than this share of its budget below it is done.
    """
    bounds = scale_range(candidate, size)
    found = _largest(lambda scale: scaled(candidate, scale, size), bounds, cost_of, budget, tolerance)
    if not isinstance(candidate, VerticalSlash):
        return found
    verticals = np.asarray(found.sizes.vertical_size)

    def with_verticals(scale: np.ndarray) -> PatternArrays:
        more = np.minimum(np.rint(scale * verticals), size).astype(np.int32)
        return found.sizes._replace(vertical_size=more)

    filled = _largest(with_verticals, (1.0, size / verticals.min()), cost_of, budget, tolerance)
    return filled._replace(is_within=found.is_within)


def _largest(
    sizes_at: Callable[[np.ndarray], PatternArrays],
    bounds: tuple[float, float],
    cost_of: Callable[[PatternArrays], np.ndarray],
    budget: np.ndarray,
    tolerance: float,
) -> Equalised:
    """Bisection of the scale of each head, on a logarithmic range, up to the largest whose cost is within the budget.

    sizes_at: scale float64 [N] -> sizes int32 [N], which grow with it. bounds: least and largest scale.
    """
    smallest, largest = bounds
    low, high = np.full(budget.shape, smallest), np.full(budget.shape, np.inf)
    sizes = sizes_at(low)
    cost = np.asarray(cost_of(sizes), np.float64)
    is_within = cost <= budget
    done = ~is_within | (cost >= (1 - tolerance) * budget)
    for _ in range(_MOST_TRIALS):
        # Upwards from the proportions as they were given, which are meant for some budget, then between two scales.
        upwards = np.minimum(np.maximum(1.0, 2 * low), largest)
        between = np.sqrt(low * np.where(np.isinf(high), 1.0, high))
        trial = np.where(done, low, np.where(np.isinf(high), upwards, between))
        tried = sizes_at(trial)
        is_new = np.stack([new != old for new, old in zip(tried, sizes, strict=True)]).any(axis=0)
        done |= ~is_new & (np.isfinite(high) | (trial >= largest))
        if done.all():
            break
        costs = np.asarray(cost_of(tried), np.float64)
        fits = (costs <= budget) & ~done
        low, high = np.where(fits, trial, low), np.where(fits | done, high, trial)
        sizes = PatternArrays(*(np.where(fits, new, old) for new, old in zip(tried, sizes, strict=True)))
        cost = np.where(fits, costs, cost)
        done |= (cost >= (1 - tolerance) * budget) | (low >= largest)
    return Equalised(sizes, cost, is_within)
