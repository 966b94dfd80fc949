"""Compares candidates at every head of one layer: sizes that cost the budget, then the error of the output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax import Array

from minference_jax.analysis import LayerActivations, SparseSettings, head_densities, head_errors, sparse_outputs
from minference_jax.analysis.timing import dense_milliseconds, head_milliseconds
from minference_jax.patterns import AShape, Dense, HeadPattern, PatternArrays, uniform_patterns
from minference_jax.search.budget import Equalised, equalise
from minference_jax.search.candidates import head_patterns
from minference_jax.search.results import CandidateResult, LayerResult

Cost = Literal["tiles", "time"]

TOLERANCE = 0.02
"""How far below the budget a candidate may stay where its sizes could still grow, as a share of it. By time also how
far above: a measurement is not exact."""
LAST_SHARE = 0.5
"""Share of a prompt's error that its last 64 queries have: they ask, and what follows is answered from what they read.
Among all queries of a long prompt they would count for nothing."""
_TIME_ROUNDS = 3  # measurements, each after a correction of the tiles that the time allows


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What stays the same from layer to layer.

    Attributes:
        candidates: kinds and proportions.
        budget: that was asked for, as a share of dense attention.
        budgets: of a head, likewise, the levels; every candidate is compared at each.
        dense_heads: whether heads may stay dense.
        cost: "tiles" or "time".
        settings: how attention runs.
        size: most tokens of a prompt.
    """

    candidates: tuple[HeadPattern, ...]
    budget: float
    budgets: tuple[float, ...]
    dense_heads: bool
    cost: Cost
    settings: SparseSettings
    size: int

    def allowed(self, budget: float) -> float:
        """The largest cost that counts as within a budget."""
        return budget * (1 + TOLERANCE) if self.cost == "time" else budget

    def layer(
        self, index: int, activations: list[LayerActivations], told: Callable[[HeadPattern], None] = lambda _: None
    ) -> LayerResult:
        """All candidates at all budgets in one layer, and dense attention where heads may have it.

        Args:
            index: of the layer.
            activations: one for each prompt.
            told: called with each candidate before it is compared.

        Raises:
            ValueError: there is nothing that some head may have, or an output is not finite.
            NotImplementedError, MemoryError: as `sparse_attention`.
        """
        dense = [dense_milliseconds(layer) for layer in activations] if self.cost == "time" else None
        results, least = [], np.full(activations[0].q.shape[2], np.inf)
        for candidate, budget in itertools.product(self.candidates, self.budgets):
            told(candidate)
            found = self._at_budget(activations, candidate, budget, dense)
            least = np.minimum(least, found.cost)
            results.append(self._result(index, activations, candidate, budget, found))
        if self.dense_heads:
            told(Dense())
            results.append(self._dense(activations, dense))
        self._check_possible(index, results, least)
        return LayerResult(index, tuple(results), output_norms(activations))

    def _dense(self, activations: list[LayerActivations], whole: list[float] | None) -> CandidateResult:
        """Dense attention at every head, without error: it costs all tiles, or the time that it is measured to take.

        whole: milliseconds of dense attention of all heads, for each prompt; None where tiles are counted.
        """
        count = activations[0].q.shape[2]
        cost = np.ones(count)
        if whole is not None:
            arrays = PatternArrays(*(x[0] for x in uniform_patterns(1, count, Dense()).arrays()))
            cost = self._time_shares(activations, arrays, whole)
        heads, ones, zeros = (Dense(),) * count, (1.0,) * count, (0.0,) * count
        return CandidateResult(Dense(), 1.0, heads, tuple(cost.tolist()), ones, zeros)

    def _time_shares(self, activations: list[LayerActivations], sizes: PatternArrays, whole: list[float]) -> np.ndarray:
        """Measured time of every head, over that of an average head of dense attention, mean over the prompts [N]."""
        num_heads = activations[0].q.shape[2]
        taken = [head_milliseconds(layer, sizes, self.settings) for layer in activations]
        return np.mean([ms * num_heads / dense for ms, dense in zip(taken, whole, strict=True)], axis=0)

    def _at_budget(
        self, activations: list[LayerActivations], candidate: HeadPattern, budget: float, dense: list[float] | None
    ) -> Equalised:
        if dense is not None:
            return self._by_time(activations, candidate, budget, dense)
        return self._by_tiles(activations, candidate, np.full(activations[0].q.shape[2], budget))

    def _by_tiles(self, activations: list[LayerActivations], candidate: HeadPattern, budget: np.ndarray) -> Equalised:
        def density(sizes: PatternArrays) -> np.ndarray:
            shares = [head_densities(layer, sizes, self.settings) for layer in activations]
            return np.mean([np.asarray(share, np.float64) for share in shares], axis=0)

        return equalise(candidate, density, budget, size=self.size, tolerance=TOLERANCE)

    def _by_time(
        self, activations: list[LayerActivations], candidate: HeadPattern, budget: float, dense: list[float]
    ) -> Equalised:
        """Corrects the tiles that each head may have by what they are measured to take.

        A head has the sizes that were measured nearest below the budget; one that is always above it, the fastest.
        dense: milliseconds of all heads, for each prompt.
        """
        tiles, best = np.full(activations[0].q.shape[2], budget), None
        for _ in range(_TIME_ROUNDS):
            found = self._by_tiles(activations, candidate, np.minimum(tiles, 1.0))
            cost = self._time_shares(activations, found.sizes, dense)
            found = found._replace(cost=cost, is_within=cost <= self.allowed(budget))
            best = found if best is None else _better(best, found)
            if (best.is_within & (best.cost >= (1 - TOLERANCE) * budget)).all():
                break
            tiles = tiles * budget / cost
        return best  # type: ignore[return-value]

    def _result(
        self,
        index: int,
        activations: list[LayerActivations],
        candidate: HeadPattern,
        budget: float,
        found: Equalised,
    ) -> CandidateResult:
        """The error of a candidate at every head, with the sizes that were found."""
        squares, density = np.zeros((2, found.cost.size)), np.zeros(found.cost.size)
        for layer in activations:
            out, _, share = sparse_outputs(layer, found.sizes, self.settings)
            squares += _squares(out, layer)
            density += np.asarray(share, np.float64) / len(activations)
        error = np.sqrt(squares[0] / np.where(squares[1] > 0, squares[1], 1.0))
        if not np.isfinite(error).all():
            head = int(np.flatnonzero(~np.isfinite(error))[0])
            raise ValueError(f"layer {index}, head {head}: the attention output is not finite, so nothing is nearest")

        def where_within(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(x if fits else None for x, fits in zip(values, found.is_within.tolist(), strict=True))

        patterns = where_within(head_patterns(candidate, found.sizes))
        columns = (where_within(x.tolist()) for x in (found.cost, density, error))
        return CandidateResult(candidate, budget, patterns, *columns)

    def _check_possible(self, index: int, results: list[CandidateResult], least: np.ndarray) -> None:
        """Refuses a budget that nothing can keep at a head that can't stay dense; least: its lowest sparse cost."""
        fits = np.array([[error is not None for error in one.error] for one in results]).any(axis=0)
        if fits.all():
            return
        head = int(np.flatnonzero(~fits)[0])
        where, given, largest = f"layer {index}, head {head}", f"{self.budget:.3g}", max(self.budgets)
        if largest != self.budget:
            given += f" ({largest:.3g} at its largest level)"
        if self.cost == "time":
            raise ValueError(
                f"{where}: sparse takes longer than the budget at this length: at {self.size:,} tokens the fastest "
                f"candidate takes {least[head]:.2f} of dense attention's time, the budget is {given}: give longer "
                f'prompts or a larger budget, or count tiles (cost="tiles")'
            )
        has_a_shape = any(isinstance(candidate, AShape) for candidate in self.candidates)
        raise ValueError(
            f"{where}: every candidate costs more than the budget of {given}, at its least sizes {least[head]:.3f} of "
            f"dense attention's tiles: give a larger budget{'' if has_a_shape else ', or an A-shape as a candidate'}"
        )


def _better(best: Equalised, found: Equalised) -> Equalised:
    """Of two measurements of each head: within the budget the dearer one, above it the cheaper one."""
    old, new = (np.where(one.is_within, one.cost, -one.cost) for one in (best, found))
    takes = new > old

    sizes = PatternArrays(
        *(np.where(takes, ours, theirs) for ours, theirs in zip(found.sizes, best.sizes, strict=True))
    )
    cost, is_within = (np.where(takes, getattr(found, name), getattr(best, name)) for name in ("cost", "is_within"))
    return Equalised(sizes, cost, is_within)


def output_norms(activations: list[LayerActivations]) -> tuple[float, ...]:
    """The norm of dense attention's output at each of N heads, over all prompts, with the weights of the errors."""
    return tuple(np.sqrt(sum(_squares(x.out, x)[1] for x in activations)).tolist())


def _squares(out: Array, layer: LayerActivations) -> np.ndarray:
    """Of every head the squares of the error and of dense attention's output [2, N], weighted as a search does it."""
    squares = head_errors(out, layer.out, layer.kv_len, last_share=LAST_SHARE)
    return np.stack([np.asarray(x, np.float64) for x in squares])
