"""What a search found, as data: for every layer each candidate's sizes, cost and error, and the choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

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
            output, over all queries of all prompts; None as above.
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
        candidates: in the order of the search.
        output_norms: N numbers, norm of dense attention's output over all prompts: tells another model or other
            prompts apart when a search goes on.
    """

    layer: int
    candidates: tuple[CandidateResult, ...]
    output_norms: tuple[float, ...]


class SearchResult(NamedTuple):
    """A finished search.

    Attributes:
        patterns: the choice for every head, with its error as score.
        layers: what was compared, one for each layer.
    """

    patterns: ModelPatterns
    layers: tuple[LayerResult, ...]


def choose(layers: Sequence[LayerResult], budget: float) -> list[list[CandidateResult]]:
    """The result that each head of each layer is to have: the least sum of errors at a mean cost within the budget.

    Where every result costs the budget at most, that is the least error of each head; of equal ones the first counts.
    Otherwise every head minimises its error plus a price times its cost, one price for all, the lowest that will do.

    Args:
        layers: one or more.
        budget: of the mean cost over all heads.

    Raises:
        ValueError: no result keeps within its own budget at some head, or none is cheap enough.
    """
    errors, costs = ([_table(getattr(one, name) for one in layer.candidates) for layer in layers] for name in _COLUMNS)
    error, cost = np.concatenate(errors, axis=1), np.concatenate(costs, axis=1)  # [candidates, heads of all layers]
    num_heads = len(layers[0].output_norms)
    impossible = np.flatnonzero(np.isinf(error).all(axis=0))
    if impossible.size:
        layer, head = divmod(int(impossible[0]), num_heads)
        raise ValueError(
            f"layer {layers[layer].layer}, head {head}: every candidate costs more than the budget at its least sizes: "
            f"give a larger budget or an A-shape among the candidates"
        )

    def at(price: float) -> np.ndarray:
        return np.argmin(error + price * np.where(np.isinf(cost), 0.0, cost), axis=0)

    def mean_cost(which: np.ndarray) -> float:
        return float(np.take_along_axis(cost, which[None], axis=0).mean())

    low, high = 0.0, 1.0
    which = at(low)
    if mean_cost(which) > budget:
        while mean_cost(at(high)) > budget and high < _MOST_PRICE:
            high *= 4
        for _ in range(_PRICE_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if mean_cost(at(middle)) <= budget else (middle, high)
        which = at(high)
        if mean_cost(which) > budget:
            least = f"{mean_cost(which):.3f}"
            raise ValueError(f"the cheapest results cost {least}, more than {budget=}: give a lower level, too")
    table = which.reshape(-1, num_heads)
    return [[layer.candidates[i] for i in row] for layer, row in zip(layers, table.tolist(), strict=True)]


_COLUMNS = ("error", "cost")
_MOST_PRICE, _PRICE_STEPS = 1e12, 60


def _table(columns: Iterable[tuple[float | None, ...]]) -> np.ndarray:
    return np.array([[np.inf if x is None else x for x in column] for column in columns])


def as_patterns(layers: tuple[LayerResult, ...], budget: float, *, model: str | None, source: str) -> ModelPatterns:
    """The choices of all layers, exactly as they were found, with their errors as scores.

    Raises:
        ValueError: as `choose`.
    """
    chosen = choose(layers, budget)
    return ModelPatterns(
        layers=tuple(tuple(one.patterns[head] for head, one in enumerate(row)) for row in chosen),  # type: ignore[misc]
        scores=tuple(tuple(one.error[head] for head, one in enumerate(row)) for row in chosen),
        score_name=SCORE_NAME,
        score_direction=SCORE_DIRECTION,
        model=model,
        source=source,
    )
