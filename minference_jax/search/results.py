"""What a search found, as data: for every layer each candidate's sizes, cost and error, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from minference_jax.index import SlashGranularity
from minference_jax.patterns import HeadPattern, ModelPatterns, ScoreDirection

SCORE_NAME = "relative_output_error"
SCORE_DIRECTION: ScoreDirection = "lower_is_better"


class CandidateResult(NamedTuple):
    """One candidate at one budget in one layer.

    Attributes:
        candidate: kind and proportions.
        budget: what a head was allowed to cost.
        patterns: N head patterns, the candidate at that budget; None for a head whose least sizes cost more.
        cost: N numbers, as the search counts; None as above.
        density: N numbers, share of dense attention's tiles; None as above.
        error: N numbers, norm of the output's difference from dense attention over the norm of dense attention's
            output, over all queries of all prompts, weighted as in `search_patterns`; None as above.
    """

    candidate: HeadPattern
    budget: float
    patterns: tuple[HeadPattern | None, ...]
    cost: tuple[float | None, ...]
    density: tuple[float | None, ...]
    error: tuple[float | None, ...]


class LayerResult(NamedTuple):
    """One layer.

    Attributes:
        layer: index, from 0.
        candidates: in the order of the search; behind them dense attention, where heads may stay dense: it has no
            error, and costs 1 by tiles, by time what it was measured to take.
        output_norms: N numbers, norm of dense attention's output over all prompts, each of which counts alike, with
            half of the weight on the last 64 queries of each, as in the errors: what a head's error is weighted with,
            and what tells another model or other prompts apart when a search goes on.
    """

    layer: int
    candidates: tuple[CandidateResult, ...]
    output_norms: tuple[float, ...]


Chosen: TypeAlias = tuple[tuple[CandidateResult, ...], ...]


class SearchResult(NamedTuple):
    """A finished search.

    Attributes:
        patterns: the choice for every head, with its error as score.
        layers: what was compared, one for each layer.
        chosen: for each layer the result that each head has.
    """

    patterns: ModelPatterns
    layers: tuple[LayerResult, ...]
    chosen: Chosen


def choose(layers: Sequence[LayerResult], budget: float) -> Chosen:
    """The result that each head of each layer is to have: little loss in all at a mean cost within the budget.

    A head's loss is its squared error as a share of the layer's output: (error * output_norm)^2 over the sum of the
    squared output norms of the layer. Summed over the heads it is the squared error of the layer, relative to dense.

    Where the best result of every head keeps the mean cost within the budget, these are chosen; of equal ones the
    first. Else cost is given a price, the same for all heads, and each takes the result whose loss + price * cost is
    least: the higher the price, the less they all cost. The price is the lowest that keeps the mean cost within the
    budget. No other choice at that cost or less has less loss; one that uses what it leaves of the budget may have.

    Args:
        layers: one or more.
        budget: of the mean cost over all heads.

    Returns:
        For each layer N results, those of its heads.

    Raises:
        ValueError: no result keeps within its own budget at some head, or the cheapest together cost too much.
    """
    cost, loss = _table(layers, "cost"), _losses(layers)
    impossible = np.argwhere(np.isinf(loss).all(axis=1))
    if impossible.size:
        layer, head = impossible[0].tolist()
        raise ValueError(f"layer {layers[layer].layer}, head {head}: no candidate keeps within its budget")
    if least_cost(layers) > budget:
        raise ValueError(_too_dear(least_cost(layers), budget))

    def at(price: float) -> np.ndarray:
        return np.argmin(loss + price * np.where(np.isinf(cost), 0.0, cost), axis=1)  # [L, N]

    def fits(which: np.ndarray) -> bool:
        return float(np.take_along_axis(cost, which[:, None], axis=1).mean()) <= budget

    which = at(0.0)
    if not fits(which):
        low, high = 0.0, 1.0
        while not fits(at(high)) and high < _MOST_PRICE:
            high *= 4
        for _ in range(_PRICE_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(at(middle)) else (middle, high)
        which = at(high) if fits(at(high)) else np.argmin(cost, axis=1)
    rows = zip(layers, which.tolist(), strict=True)
    return tuple(tuple(layer.candidates[place] for place in row) for layer, row in rows)


def least_cost(layers: Sequence[LayerResult]) -> float:
    """The mean over all heads of the cost of each one's cheapest result: no choice costs less."""
    return float(_table(layers, "cost").min(axis=1).mean())


def check_affordable(layers: Sequence[LayerResult], budget: float, num_layers: int) -> None:
    """Refuses a search whose finished layers alone cost more than the budget allows all layers.

    Args:
        layers: those that are finished.
        budget: of the mean cost over all heads of all layers.
        num_layers: of the model.

    Raises:
        ValueError: no choice can keep the budget any more.
    """
    least = least_cost(layers)
    if least * len(layers) > budget * num_layers:
        raise ValueError(f"{len(layers)} of {num_layers} layers: {_too_dear(least, budget)}")


def _too_dear(cost: float, budget: float) -> str:
    return (
        f"the cheapest results cost {cost:.3f} in the mean, more than {budget=:.3g}: "
        "give a larger budget, a lower level, too, or longer prompts"
    )


_MOST_PRICE, _PRICE_STEPS = 1e12, 60


def _table(layers: Sequence[LayerResult], name: str) -> np.ndarray:
    """A column of all results, [L, candidates, N]; infinite where a candidate can't keep within its budget."""
    columns = [[getattr(one, name) for one in layer.candidates] for layer in layers]
    return np.array([[[np.inf if x is None else x for x in row] for row in layer] for layer in columns])


def _losses(layers: Sequence[LayerResult]) -> np.ndarray:
    """[L, candidates, N]; see `choose`."""
    norms = np.array([layer.output_norms for layer in layers])
    whole = np.sqrt(np.square(norms).sum(axis=1, keepdims=True))
    share = norms / np.where(whole > 0, whole, 1.0)
    error = _table(layers, "error")
    with np.errstate(invalid="ignore"):  # a head without output has no share: infinity times 0
        loss = np.square(error * share[:, None])
    return np.where(np.isinf(error), np.inf, loss)


def as_patterns(
    chosen: Chosen, *, model: str | None, slash_granularity: SlashGranularity, made_by: str
) -> ModelPatterns:
    """The choices of all layers, exactly as they were found, with their errors as scores."""
    return ModelPatterns(
        layers=tuple(tuple(one.patterns[head] for head, one in enumerate(row)) for row in chosen),  # type: ignore[misc]
        scores=tuple(tuple(one.error[head] for head, one in enumerate(row)) for row in chosen),
        score_name=SCORE_NAME,
        score_direction=SCORE_DIRECTION,
        model=model,
        slash_granularity=slash_granularity,
        made_by=made_by,
        source=made_by,
    )
