"""The search itself: layer by layer, all heads of a layer at once, every candidate at the same cost."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from minference_jax.analysis import (
    LayerActivations,
    SparseSettings,
    head_densities,
    head_errors,
    read_layers,
    settings_for,
    sparse_outputs,
)
from minference_jax.analysis.timing import dense_milliseconds, head_milliseconds
from minference_jax.generate import LanguageModel
from minference_jax.generate.prompts import Tokens
from minference_jax.index import SlashGranularity
from minference_jax.models.digest import weights_digest
from minference_jax.patterns import HeadPattern, PatternArrays
from minference_jax.search.budget import Equalised, equalise
from minference_jax.search.candidates import DEFAULT_CANDIDATES, check_candidates, head_patterns
from minference_jax.search.journal import Journal, pattern_fields
from minference_jax.search.results import CandidateResult, LayerResult, SearchResult, as_patterns, choose

Cost = Literal["tiles", "time"]
Progress = Callable[[int, int, str], None]

DEFAULT_BUDGET = 0.3
"""Share of dense attention's work: that of the A-shape of 1024 sinks and a window of 4096 at 30K tokens, which all
candidates of arXiv 2407.02490 cost."""
TOLERANCE = 0.02
"""How far below the budget a candidate may stay where its sizes could still grow, as a share of it."""
_TIME_ROUNDS = 3  # measured corrections of the tiles that a time allows
_SAME_NORM = 0.02  # dense outputs of one model differ by less between runs and devices, half precision included


def search_patterns(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    *,
    budget: float = DEFAULT_BUDGET,
    levels: Sequence[float] = (1.0,),
    cost: Cost = "tiles",
    candidates: Sequence[HeadPattern] = DEFAULT_CANDIDATES,
    slash_granularity: SlashGranularity = "line",
    implementation: str | None = None,
    name: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    finished: Callable[[LayerResult], None] | None = None,
) -> SearchResult:
    """Finds the pattern of every head: of candidates that cost the same, the one whose output is nearest to dense.

    Each layer reads what dense attention gives in the layers below. Each candidate is made as large as the budget
    allows, for each head by itself, by what its tiles really cost with the lists estimated on the prompts; then the
    outputs are compared with the real values. Estimate, layout and attention are those of a prefill: the same call.
    Activations of one layer of all prompts are held at a time.

    Args:
        model: with its weights; where these are, the search runs.
        prompts: token ids of each calibration prompt, of any lengths; errors are over all of their queries.
        budget: what a head may cost, as a share of dense attention, above 0 and below 1; over several prompts the mean.
        levels: budgets that a head may get, as multiples of `budget`. One: all heads cost the same, as in the paper.
            Several, such as 0.5, 1 and 2: heads that need more get more, and the mean over all heads keeps the budget.
        cost: "tiles" = the work of the computed tiles (density); "time" = measured time of attention on this device.
        candidates: kinds with proportions of sizes; None of them may be dense.
        slash_granularity: "line" or "block", with which the patterns are to run.
        implementation: of sparse attention; None = the first that can.
        name: of the model, as the pattern file is to say it; None = it says none.
        journal: file that keeps finished layers, made where there is none: an interrupted search with the same
            arguments goes on behind them. None = nothing is kept.
        progress: called as (steps done, steps in all, what comes next).
        finished: called with each layer that was searched.

    Returns:
        SearchResult; its patterns have the error as score, "relative_output_error", lower is better.

    Raises:
        ValueError: arguments that make no sense, prompts that the model can't read, a journal of another search, or a
            budget that no candidate can keep.
        NotImplementedError: the named implementation can't do the call.
        MemoryError: the device has too little.
        OSError: the journal can't be read or written.

    Source: arXiv 2407.02490, section 3.2 and algorithm 1. Costs are counted on real tiles, errors on the output.
    """
    check_candidates(candidates)
    if not (isinstance(budget, int | float) and 0 < budget < 1):
        raise ValueError(f"{budget=} must be above 0 and below 1, a share of dense attention's cost")
    budgets = [budget * level for level in levels]
    if not budgets or len(set(budgets)) < len(budgets) or not all(0 < one < 1 for one in budgets):
        raise ValueError(f"levels={list(levels)} must be different multiples of {budget=}, each above 0 and below 1")
    if cost not in get_args(Cost):
        raise ValueError(f'{cost=} must be "tiles" or "time"')
    settings = settings_for(model, slash_granularity=slash_granularity, implementation=implementation)
    layers = read_layers(model, prompts)
    search = _Search(
        candidates=tuple(candidates), budgets=tuple(budgets), cost=cost, settings=settings, size=max(map(len, prompts))
    )
    kept = Journal(journal, _described(model, prompts, search, name))
    total, done = model.config.num_layers * len(candidates) * len(budgets), 0
    for index, activations in enumerate(layers):
        if index < len(kept.layers):
            _check_same(kept.layers[index], activations)
            done += len(candidates) * len(budgets)
            continue
        found = []
        for candidate, allowed in itertools.product(candidates, budgets):
            if progress is not None:
                progress(done, total, f"layer {index}, {pattern_fields(candidate)['kind']}")  # type: ignore[index]
            found.append(search.compare(index, activations, candidate, allowed))
            done += 1
        result = LayerResult(index, tuple(found), _norms(activations))
        choose([result], 1.0)  # a budget that nothing can keep is to be said now
        kept.add(result)
        if finished is not None:
            finished(result)
    if progress is not None:
        progress(total, total, "done")
    source = f"search at {budget:g} of dense attention's {cost} on {len(prompts)} prompts of up to {search.size} tokens"
    return SearchResult(as_patterns(tuple(kept.layers), budget, model=name, source=source), tuple(kept.layers))


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What stays the same from layer to layer."""

    candidates: tuple[HeadPattern, ...]
    budgets: tuple[float, ...]  # of a head
    cost: Cost
    settings: SparseSettings
    size: int  # most tokens of a prompt

    def compare(
        self, index: int, activations: list[LayerActivations], candidate: HeadPattern, budget: float
    ) -> CandidateResult:
        """One candidate in one layer, at one budget: its error at every head."""
        num_heads = activations[0].q.shape[2]
        found = self._by_tiles(activations, candidate, np.full(num_heads, budget))
        if self.cost == "time":
            found = self._by_time(activations, candidate, found, budget)
        squares, density = np.zeros((2, num_heads)), np.zeros(num_heads)
        for layer in activations:
            out, _, share = sparse_outputs(layer, found.sizes, self.settings)
            squares += np.stack([np.asarray(x, np.float64) for x in head_errors(out, layer.out, layer.kv_len)])
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

    def _by_tiles(self, activations: list[LayerActivations], candidate: HeadPattern, budget: np.ndarray) -> Equalised:
        def density(sizes: PatternArrays) -> np.ndarray:
            shares = [head_densities(layer, sizes, self.settings) for layer in activations]
            return np.mean([np.asarray(share, np.float64) for share in shares], axis=0)

        return equalise(candidate, density, budget, size=self.size, tolerance=TOLERANCE)

    def _by_time(
        self, activations: list[LayerActivations], candidate: HeadPattern, found: Equalised, budget: float
    ) -> Equalised:
        """Corrects the tiles that each head may have by what they are measured to take; a measurement is not exact."""
        num_heads = activations[0].q.shape[2]
        dense = [dense_milliseconds(layer) / num_heads for layer in activations]
        tiles = np.full(num_heads, budget)
        for last in range(_TIME_ROUNDS - 1, -1, -1):
            taken = [head_milliseconds(layer, found.sizes, self.settings) for layer in activations]
            cost = np.mean([ms / whole for ms, whole in zip(taken, dense, strict=True)], axis=0)
            if not last:
                break
            tiles = np.minimum(tiles * budget / cost, 1.0)
            found = self._by_tiles(activations, candidate, tiles)
        return found._replace(cost=cost)


def _norms(activations: list[LayerActivations]) -> tuple[float, ...]:
    squares = [np.asarray(head_errors(x.out, x.out, x.kv_len)[1], np.float64) for x in activations]
    return tuple(np.sqrt(np.sum(squares, axis=0)).tolist())


def _check_same(kept: LayerResult, activations: list[LayerActivations]) -> None:
    """Refuses to go on with a search that another model began."""
    now = np.array(_norms(activations))
    if len(kept.output_norms) != now.size or not np.allclose(now, kept.output_norms, rtol=_SAME_NORM):
        raise ValueError(
            f"layer {kept.layer} gives other outputs than when the search began: the weights are not the same; remove "
            f"the journal, or name another output"
        )


def _described(model: LanguageModel, prompts: Sequence[Tokens], search: _Search, name: str | None) -> dict[str, Any]:
    """All that the result depends on, as JSON."""
    tokens = hashlib.sha256(b"".join(np.asarray(x, np.int64).tobytes() + b";" for x in prompts)).hexdigest()
    return {
        "model": name,
        "weights": weights_digest(model.model),
        "num_layers": model.config.num_layers,
        "num_heads": model.config.num_heads,
        "dtype": str(model.model.dtype),
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "prompt_tokens_sha256": tokens,
        "budgets": list(search.budgets),
        "cost": search.cost,
        "tolerance": TOLERANCE,
        "candidates": [pattern_fields(x) for x in search.candidates],
        "slash_granularity": search.settings.slash_granularity,
        "implementation": search.settings.implementation,
        "tiles": asdict(search.settings.tiles),
    }
