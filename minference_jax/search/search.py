"""The search itself: what it is asked is checked, then layer by layer every candidate is compared, and one chosen."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any, get_args

import numpy as np

from minference_jax.analysis import LayerActivations, read_layers, settings_for
from minference_jax.generate import LanguageModel
from minference_jax.generate.prompts import Tokens
from minference_jax.index import SlashGranularity
from minference_jax.models.digest import weights_digest
from minference_jax.patterns import HeadPattern
from minference_jax.patterns.heads import KINDS
from minference_jax.search.candidates import DEFAULT_CANDIDATES, check_candidates
from minference_jax.search.compare import LAST_SHARE, TOLERANCE, Comparison, Cost, output_norms
from minference_jax.search.journal import Journal, pattern_fields
from minference_jax.search.results import LayerResult, SearchResult, as_patterns, check_affordable, choose

Progress = Callable[[int, int, str], None]

DEFAULT_BUDGET = 0.3
"""Share of dense attention's work: that of the A-shape of 1024 sinks and a window of 4096 at 30K tokens, which all
candidates of arXiv 2407.02490 cost."""
DEFAULT_LEVELS = (0.5, 1.0, 2.0)
"""Multiples of the budget at which candidates are compared, where they are below all of dense."""
_SAME_NORM = 0.02  # dense outputs of one model differ by less between runs and devices, half precision included


def search_patterns(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    *,
    budget: float = DEFAULT_BUDGET,
    levels: Sequence[float] | None = None,
    dense_heads: bool | None = None,
    cost: Cost = "tiles",
    candidates: Sequence[HeadPattern] = DEFAULT_CANDIDATES,
    slash_granularity: SlashGranularity = "line",
    implementation: str | None = None,
    name: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    finished: Callable[[LayerResult], None] | None = None,
) -> SearchResult:
    """Finds the pattern of every head: of candidates at several budgets those nearest to dense, at a mean cost.

    Each layer reads what dense attention gives in the layers below. Each candidate is made as large as the budget
    allows, for each head by itself, by what its tiles really cost with the lists estimated on the prompts; then the
    outputs are compared with the real values, and `choose` shares the cost out over all heads. Estimate,
    layout and attention are those of a prefill: the same call.
    Activations of one layer of all prompts are held at a time; `analysis.activation_bytes` says how much that is.

    Args:
        model: with its weights; where these are, the search runs.
        prompts: token ids of each calibration prompt, of any lengths. Each ends in what it asks: its last 64 queries
            have half of its error's weight, all queries share the other half. Each prompt counts alike, long or short.
        budget: what heads may cost in the mean, as a share of dense attention, above 0 and below 1; over several
            prompts the mean.
        levels: budgets that a head may get, as multiples of `budget`, the least at most 1. Several: heads that need
            more get more, and the mean over all heads keeps the budget; it takes as many times as long. (1.0,): all
            heads cost the same, as in the paper. None = 0.5, 1 and 2, without 2 where that is all of dense or more.
        dense_heads: whether heads that need it may stay dense, which costs 1, or by time what it is measured to take.
            None = with several levels.
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
        SearchResult; its patterns have the error, weighted so, as score, "relative_output_error", lower is better, and
        say the granularity and what they were searched on.

    Raises:
        ValueError: arguments that make no sense, prompts that the model can't read, a journal of another search, or a
            budget that no candidate can keep.
        NotImplementedError: the named implementation can't do the call.
        MemoryError: the device has too little.
        OSError: the journal can't be read or written.

    Source: arXiv 2407.02490, section 3.2 and algorithm 1. Costs are counted on real tiles, errors on the output.
    """
    candidates = check_candidates(candidates)
    budgets = level_budgets(budget, levels)
    if not isinstance(dense_heads, bool | None):
        raise ValueError(f"{dense_heads=} must be True, False or None")
    dense_heads = len(budgets) > 1 if dense_heads is None else dense_heads
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"{name=} must be the name of a model or None")
    if cost not in get_args(Cost):
        raise ValueError(f'{cost=} must be "tiles" or "time"')
    settings = settings_for(model, slash_granularity=slash_granularity, implementation=implementation)
    layers = read_layers(model, prompts)
    search = Comparison(
        candidates=candidates,
        budget=float(budget),
        budgets=budgets,
        dense_heads=dense_heads,
        cost=cost,
        settings=settings,
        size=max(map(len, prompts)),
    )
    kept = Journal(journal, _described(model, prompts, search, name))
    num_layers, allowed = model.config.num_layers, search.allowed(search.budget)
    steps = len(candidates) * len(budgets) + dense_heads
    for index, activations in enumerate(layers):
        if index < len(kept.layers):
            _check_same(kept.layers[index], activations)
        else:
            told = _told(progress, index, num_layers, steps)
            kept.add(search.layer(index, activations, told))
            check_affordable(kept.layers, allowed, num_layers)
            if finished is not None:
                finished(kept.layers[-1])
        activations.clear()  # else they would lie beside those of the next layer
    if progress is not None:
        progress(num_layers * steps, num_layers * steps, "done")
    chosen = choose(kept.layers, allowed)
    made_by = (
        f"search at {budget:g} of dense attention's {cost} on {len(prompts)} prompts of up to {search.size} tokens"
    )
    patterns = as_patterns(chosen, model=name, slash_granularity=slash_granularity, made_by=made_by)
    return SearchResult(patterns, tuple(kept.layers), chosen)


def level_budgets(budget: float, levels: Iterable[float] | None) -> tuple[float, ...]:
    """The budgets at which candidates are compared.

    Args:
        budget, levels: as in `search_patterns`.

    Raises:
        ValueError: they make no sense.
    """
    if not (isinstance(budget, Real) and 0 < budget < 1):
        raise ValueError(f"{budget=} must be above 0 and below 1, a share of dense attention's cost")
    if levels is None:
        levels = [level for level in DEFAULT_LEVELS if budget * level < 1]
    levels = list(levels) if isinstance(levels, Iterable) else [levels]
    if not all(isinstance(level, Real) for level in levels):
        raise ValueError(f"{levels=} must be numbers, multiples of {budget=}")
    budgets = tuple(float(budget) * float(level) for level in levels)
    if not budgets or len(set(budgets)) < len(budgets) or not all(0 < one < 1 for one in budgets):
        raise ValueError(f"{levels=} must be different multiples of {budget=}, each above 0 and below 1")
    if min(levels) > 1:
        raise ValueError(f"{levels=} must begin at 1 or less: above it no mean keeps the budget")
    return budgets


def _told(progress: Progress | None, index: int, num_layers: int, steps: int) -> Callable[[HeadPattern], None]:
    """What reports each step of a layer."""
    done = itertools.count(index * steps)

    def told(candidate: HeadPattern) -> None:
        if progress is not None:
            kind = KINDS[type(candidate)].name.lower()
            progress(next(done), num_layers * steps, f"layer {index}, {kind}")

    return told


def _check_same(kept: LayerResult, activations: list[LayerActivations]) -> None:
    """Refuses to go on with a search that another model began."""
    now = np.array(output_norms(activations))
    if len(kept.output_norms) != now.size or not np.allclose(now, kept.output_norms, rtol=_SAME_NORM):
        raise ValueError(
            f"layer {kept.layer} gives other outputs than when the search began: the weights are not the same; remove "
            f"the journal, or name another output"
        )


def _described(model: LanguageModel, prompts: Sequence[Tokens], search: Comparison, name: str | None) -> dict[str, Any]:
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
        "dense_heads": search.dense_heads,
        "cost": search.cost,
        "tolerance": TOLERANCE,
        "last_share": LAST_SHARE,
        "candidates": [pattern_fields(x) for x in search.candidates],
        "slash_granularity": search.settings.slash_granularity,
        "implementation": search.settings.implementation,
        "tiles": asdict(search.settings.tiles),
    }
